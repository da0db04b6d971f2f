"""The maths of folding, against exact and against float64 sums."""

import json
import math
import re
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jina_v4_merge.errors import ConfigError
from jina_v4_merge.lora import fold, lora_config

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 32, "lora_alpha": 32, "bias": "none"}

sizes = st.integers(1, 48)
seeds = st.integers(0, 2**31)


@given(n_out=sizes, n_in=sizes, rank=sizes, seed=seeds, power=st.integers(-3, 3), dtype=st.sampled_from(DTYPES))
def test_a_sum_that_float32_holds_exactly_is_rounded_just_once(
    n_out: int, n_in: int, rank: int, seed: int, power: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Eighths up to 4: every product and every partial sum has few enough bits for float32.
    weight, a, b = (
        torch.randint(-32, 33, shape, generator=generator).double() / 8
        for shape in ((n_out, n_in), (rank, n_in), (n_out, rank))
    )
    scaling = 2.0**power
    folded = fold(weight.bfloat16(), a.bfloat16(), b.bfloat16(), scaling, dtype)
    assert folded.dtype == dtype
    assert torch.equal(folded, (weight + scaling * (b @ a)).to(dtype))


@given(
    n_out=sizes,
    n_in=sizes,
    rank=sizes,
    seed=seeds,
    scaling=st.floats(-4, 4),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 4),
)
def test_any_sum_is_within_one_ulp_of_the_float64_sum(
    n_out: int, n_in: int, rank: int, seed: int, scaling: float, dtypes: tuple[torch.dtype, ...]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, a, b = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape, dtype in zip(((n_out, n_in), (rank, n_in), (n_out, rank)), dtypes, strict=False)
    )
    exact = weight.double() + scaling * (b.double() @ a.double())
    folded = fold(weight, a, b, scaling, dtypes[3])
    ulp = torch.finfo(dtypes[3]).eps * exact.abs().clamp(min=torch.finfo(dtypes[3]).tiny)
    # The sum itself may be off by its own rounding, at the size of its terms: they can cancel out.
    terms = weight.double().abs() + abs(scaling) * (b.double().abs() @ a.double().abs())
    sum_error = (rank + 2) * torch.finfo(torch.float64).eps * terms
    assert ((folded.double() - exact).abs() <= ulp + sum_error).all()


def test_no_input_is_changed() -> None:
    inputs = torch.randn(4, 3), torch.randn(2, 3), torch.randn(4, 2)
    before = [tensor.clone() for tensor in inputs]
    fold(*inputs, 2.0, torch.float32)
    assert all(torch.equal(was, tensor) for was, tensor in zip(before, inputs, strict=True))


@pytest.mark.parametrize(
    ("changes", "scaling"),
    [
        ({}, 1.0),
        ({"lora_alpha": 8}, 0.25),
        ({"lora_alpha": 16, "use_rslora": True}, 16 / math.sqrt(32)),
        ({"lora_alpha": 2.5, "r": 5}, 0.5),
    ],
    ids=["published", "smaller alpha", "rslora", "fraction"],
)
def test_the_scaling_is_read_from_the_config(changes: dict[str, Any], scaling: float) -> None:
    config = lora_config(PLAIN | changes)
    assert config.rank == (PLAIN | changes)["r"]
    assert config.scaling == config.scaling_of("any.module") == pytest.approx(scaling, rel=1e-15)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "LOHA"),
        ("bias", "lora_only"),
        ("use_dora", True),
        ("lora_bias", True),
        ("modules_to_save", ["norm"]),
        ("fan_in_fan_out", True),
        ("layer_replication", [[0, 2]]),
        ("trainable_token_indices", [1, 2]),
        ("target_parameters", ["x"]),
        ("use_qalora", True),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{key}="):
        lora_config(PLAIN | {key: value})


@pytest.mark.parametrize(
    ("key", "value"), [("r", 0), ("r", None), ("r", "32"), ("lora_alpha", None), ("lora_alpha", math.nan)]
)
def test_rank_and_alpha_must_be_numbers(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{key}="):
        lora_config(PLAIN | {key: value})


@pytest.mark.parametrize(
    ("pattern", "value", "named"),
    [
        ("rank_pattern", {"q_proj": 0}, "rank_pattern['q_proj']=0"),
        ("rank_pattern", {"q_proj": 2.5}, "rank_pattern['q_proj']=2.5"),
        ("alpha_pattern", {"q_proj": "8"}, "alpha_pattern['q_proj']='8'"),
        ("alpha_pattern", {"q_(proj": 8}, "alpha_pattern['q_(proj'], no regular expression"),
        ("rank_pattern", ["q_proj"], "rank_pattern=['q_proj']"),
    ],
)
def test_patterns_must_hold_numbers_by_regular_expression(pattern: str, value: object, named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)):
        lora_config(PLAIN | {pattern: value})


MODULES = ["layers.0.q_proj", "layers.1.q_proj", "layers.10.q_proj", "layers.0.my_q_proj", "layers.1.up_proj", "head"]
PATTERNS = [
    {"q_proj": 4},
    {"layers.0.q_proj": 4, "q_proj": 2},
    {"q_proj": 2, "layers.0.q_proj": 4},
    {"layers.1": 4, "1.q_proj": 2},
    {"layers.[01].*": 4},
    {"^layers.0.q_proj": 4, ".*q_proj": 2},
    {"q_proj|up_proj": 4},
    {"no_such_module": 4},
]


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")
@pytest.mark.parametrize("use_rslora", [False, True], ids=["plain", "rslora"])
@pytest.mark.parametrize("alphas", [{}, *PATTERNS], ids=str)
@pytest.mark.parametrize("ranks", [{}, *PATTERNS], ids=str)
def test_ranks_and_alphas_by_pattern_are_those_of_peft(
    ranks: dict[str, int], alphas: dict[str, int], use_rslora: bool
) -> None:
    model = torch.nn.ModuleDict({"head": torch.nn.Linear(2, 2)})
    model["layers"] = torch.nn.ModuleDict()
    for i in ("0", "1", "10"):
        names = [name.rpartition(".")[2] for name in MODULES if name.startswith(f"layers.{i}.")]
        model["layers"][i] = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in names})
    config = peft.LoraConfig(
        r=8,
        lora_alpha=12,
        use_rslora=use_rslora,
        rank_pattern=ranks,
        alpha_pattern={key: value + 0.5 for key, value in alphas.items()},
        target_modules=["head", "q_proj", "my_q_proj", "up_proj"],
    )
    adapted = peft.get_peft_model(model, config).base_model.model
    ours = lora_config(json.loads(json.dumps(config.to_dict(), default=list)))
    for name in MODULES:
        layer = adapted.get_submodule(name)
        assert (ours.rank_of(name), ours.scaling_of(name)) == (layer.r["default"], layer.scaling["default"]), name
