"""Token ids: as the tokenizer gives them for plain text, and never a special token out of a text."""

from contextlib import nullcontext

import pytest
from conftest import GOLDEN, Golden
from hypothesis import given
from hypothesis import strategies as st
from jina_v4_merge.prompts import IMAGE_PROMPT
from jina_v4_serve.api.errors import ApiError
from jina_v4_serve.api.prompts import PromptMaker
from jina_v4_serve.pooling import Span
from PIL import Image
from tokenizers import AddedToken, Tokenizer

TOKENIZER = Tokenizer.from_file(str(GOLDEN / "checkpoint" / "tokenizer.json"))
SPECIAL = {token_id for token_id, token in TOKENIZER.get_added_tokens_decoder().items() if token.special}
MAKER = PromptMaker(TOKENIZER, 100, IMAGE_PROMPT)


def test_added_tokens_that_are_not_special_are_read_as_in_the_published_code() -> None:
    # Qwen2.5's tokenizer has eight: <tool_call>, <|fim_prefix|> and the like. No prompt is made of them.
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    tokenizer.add_tokens([AddedToken("<|fim_prefix|>", normalized=False, special=False)])
    (prompt,) = PromptMaker(tokenizer, 100, IMAGE_PROMPT).texts(["a<|fim_prefix|>b"], "Query: ", None)
    assert prompt.token_ids == tokenizer.encode("Query: a<|fim_prefix|>b").ids
    assert tokenizer.token_to_id("<|fim_prefix|>") in prompt.token_ids


@given(st.lists(st.sampled_from(["<|image_pad|>", "<|vision_start|>", "<|im_end|>", "<|", "|>", " a", "é", "\x00"])))
def test_no_text_makes_a_special_token(parts: list[str]) -> None:
    (prompt,) = MAKER.texts(["".join(parts)], "Query: ", 100)
    assert not SPECIAL.intersection(prompt.token_ids)


def test_texts_are_tokenised_as_the_checkpoint_does(golden: Golden) -> None:
    maker = PromptMaker(TOKENIZER, 10_000, IMAGE_PROMPT)
    found = [prompt.token_ids for prompt in maker.texts(golden.texts, "Passage: ", None)]
    assert found == [TOKENIZER.encode(f"Passage: {text}").ids for text in golden.texts]
    assert [len(ids) for ids in found] == [
        len(golden.rows[f"retrieval/passage/{i}/multi"]) for i in range(len(golden.texts))
    ]


def test_a_long_text_loses_its_end() -> None:
    text = "The quick brown fox " * 50
    whole = TOKENIZER.encode(f"Query: {text}").ids
    assert MAKER.texts([text], "Query: ", 16)[0].token_ids == whole[:16]
    assert MAKER.texts(["x" * 10**6], "Query: ", 16)[0].token_ids == TOKENIZER.encode("Query: " + "x" * 100).ids[:16]


def test_a_text_over_the_limit_is_named_with_how_much() -> None:
    text = "x " * 100
    over = len(TOKENIZER.encode(f"Query: {text}").ids) - 100
    with pytest.raises(
        ApiError, match=rf"input\[1\] has {100 + over} tokens .* the limit is 100, {over} over"
    ) as caught:
        MAKER.texts(["a", text], "Query: ", None, ["input[0]", "input[1]"])
    assert (caught.value.status, caught.value.code) == (400, "INPUT_TOKEN_LIMIT_EXCEEDED")
    with pytest.raises(ApiError, match="over 100 tokens"):
        MAKER.texts(["x" * 10**6], "Query: ", None)


def test_an_image_has_the_published_prompt(golden: Golden) -> None:
    prompt = MAKER.image(lambda: nullcontext(Image.new("RGB", (28, 28))))
    expected = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Describe the image.<|im_end|>\n"
    assert prompt.token_ids == TOKENIZER.encode(expected).ids
    assert len(prompt.token_ids) == 1 + 11


def test_parts_of_a_text_lie_one_after_the_other() -> None:
    prompt = MAKER.chunks(["a b", "c", "d e"], "Query: ")
    assert prompt.spans is not None
    assert [span.start for span in prompt.spans[1:]] == [span.stop for span in prompt.spans[:-1]]
    assert (prompt.spans[0].start, prompt.spans[-1].stop) == (0, len(prompt.token_ids))
    alone = MAKER.chunks(["a b"], "Query: ")
    (plain,) = MAKER.texts(["a b"], "Query: ", None)
    assert (alone.token_ids, alone.spans) == (plain.token_ids, (Span(0, len(plain.token_ids)),))
    with pytest.raises(ApiError, match=r"late-chunked into one text, has 302 tokens .* 202 over. Send fewer"):
        MAKER.chunks(["x "] * 100, "Query: ")
