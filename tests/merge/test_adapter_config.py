"""What an adapter_config.json may say: rank and scaling as PEFT reads them, and nothing but plain LoRA."""

import dataclasses
import json
import math
import re
import typing
from typing import Any

import peft
import pytest
import torch
from jina_v4_merge.errors import ConfigError
from jina_v4_merge.reading.adapter_config import FIELDS, lora_config

PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 32, "lora_alpha": 32, "bias": "none"}


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
        ("peft_type", "LOHA"), ("peft_type", None), ("bias", "lora_only"), ("bias", None), ("use_dora", True),
        ("lora_bias", True), ("modules_to_save", ["norm"]), ("fan_in_fan_out", True), ("layer_replication", [[0, 2]]),
        ("megatron_config", {"hidden_size": 256}), ("trainable_token_indices", [1, 2]),
        ("trainable_token_indices", {"embed_tokens": [1]}), ("target_parameters", ["x"]), ("use_qalora", True),
        ("use_rslora", "false"), ("alora_invocation_tokens", [1]), ("kasa_config", {}),
        *(("init_lora_weights", init) for init in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga")),
        *(("init_lora_weights", init) for init in ("Pissa", "some_later_one", 1, None)),
    ],
)  # fmt: skip
def test_what_is_not_plain_lora_is_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{key}={value!r}; only plain LoRA can be folded. ")):
        lora_config(PLAIN | {key: value})


def test_all_that_is_not_plain_is_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"peft_type=None, use_dora=True, later=1; .*without.*\. If later does not"):
        lora_config({"r": 8, "lora_alpha": 8, "use_dora": True, "later": 1})


def test_a_long_value_is_shortened() -> None:
    with pytest.raises(ConfigError, match=re.escape("modules_to_save=['0', '1', '2', '3', '4', '5', ...]; only plain")):
        lora_config(PLAIN | {"modules_to_save": [str(i) for i in range(1000)]})


@pytest.mark.parametrize("value", [None, False, [], {}], ids=str)
def test_a_field_of_a_later_peft_passes_when_it_is_off(value: object) -> None:
    assert lora_config(PLAIN | {"later_field": value}) == lora_config(PLAIN)


@pytest.mark.parametrize("value", [True, 0, 0.0, 1, "", "x", [0], {"a": None}], ids=repr)
def test_a_field_of_a_later_peft_that_is_not_off_is_refused_by_name(value: object) -> None:
    with pytest.raises(
        ConfigError, match=re.escape(f"later_field={value!r}; only plain LoRA can be folded. If later_")
    ):
        lora_config(PLAIN | {"later_field": value})


def test_every_field_of_pefts_config_is_known() -> None:
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields - FIELDS.keys() == set(), (
        f"PEFT {peft.__version__} has fields that FIELDS of jina_v4_merge.reading.adapter_config lacks. Read in PEFT "
        "what each does, and add it: _ANY if merging is W + scaling * (B @ A) whatever its value, else the values for "
        "which it is"
    )
    assert FIELDS.keys() - fields == set(), (
        f"PEFT {peft.__version__} lacks these fields. Older adapters have them: keep them in FIELDS, and name them here"
    )


def test_every_way_to_initialise_of_peft_is_known() -> None:
    hint = typing.get_type_hints(peft.LoraConfig)["init_lora_weights"]
    named = {name for part in typing.get_args(hint) for name in typing.get_args(part)}
    refused = {"corda", "loftq", "olora", "pissa", "pissa_niter_[number of iters]"}
    plain = {init for init in FIELDS["init_lora_weights"] or () if isinstance(init, str)}
    assert named == refused | plain, (
        f"PEFT {peft.__version__} has other values of init_lora_weights than this program knows. Does a new one leave "
        "the base alone? Then add it to _INITS and to PLAIN of test_peft, else to CHANGING there and to refused"
    )


def test_pefts_defaults_are_plain() -> None:
    assert lora_config(json.loads(json.dumps(peft.LoraConfig().to_dict()))).scaling == 1


@pytest.mark.parametrize(
    "field", [field.name for field in dataclasses.fields(peft.LoraConfig) if field.metadata.get("is_lora_variant")]
)
@pytest.mark.parametrize("value", [True, {"n": 1}], ids=["true", "a config"])
def test_what_peft_calls_a_variant_of_lora_is_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{field}="):
        lora_config(PLAIN | {field: value})


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
