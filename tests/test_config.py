"""The architecture as data: published counts, what is refused, and the way to and from Hugging Face's config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemma2.config import FULL, PRESETS, SLIDING, Gemma2Config, preset
from gemma2.errors import ConfigError, Gemma2Error

SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "query_pre_attn_scalar": 12,
    "vocab_size": 64,
}


def hf_json(**changes: Any) -> dict[str, Any]:
    return {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], **SMALL, **changes}


# -- published figures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "embedding_in_report", "non_embedding", "published_total"),
    [
        # Report, table 2 (256128 rows), and the safetensors of google/gemma-2-* (256000 rows).
        ("2b", 590_118_912, 2_024_517_888, 2_614_341_888),
        ("9b", 917_962_752, 8_324_201_984, 9_241_705_984),
        ("27b", 1_180_237_824, 26_047_480_320, 27_227_128_320),
    ],
)
def test_presets_have_the_published_parameter_counts(
    name: str, embedding_in_report: int, non_embedding: int, published_total: int
) -> None:
    config = preset(name)
    in_report = config.count_parameters(256_128)
    assert (in_report.embedding, in_report.non_embedding) == (embedding_in_report, non_embedding)
    assert config.count_parameters().total == published_total


@pytest.mark.parametrize(("name", "whole", "bounded"), [("2b", 832, 624), ("9b", 2688, 2016), ("27b", 2944, 2208)])
def test_kv_cache_of_a_whole_context(name: str, whole: int, bounded: int) -> None:
    assert preset(name).kv_cache_bytes(8192, bounded=False) == whole * 2**20
    assert preset(name).kv_cache_bytes(8192) == bounded * 2**20


def test_a_short_sequence_is_not_bounded() -> None:
    config = preset("2b")
    assert config.kv_cache_bytes(4096) == config.kv_cache_bytes(4096, bounded=False)
    assert config.kv_cache_bytes(4097) < config.kv_cache_bytes(4097, bounded=False)


@pytest.mark.parametrize(
    ("name", "width", "mlp", "layers", "heads", "kv_heads", "head_dim", "scalar"),
    [
        ("2b", 2304, 9216, 26, 8, 4, 256, 256),
        ("9b", 3584, 14336, 42, 16, 8, 256, 256),
        ("27b", 4608, 36864, 46, 32, 16, 128, 144),
    ],
)
def test_presets_are_table_1(
    name: str, width: int, mlp: int, layers: int, heads: int, kv_heads: int, head_dim: int, scalar: int
) -> None:
    config = preset(name)
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (width, mlp, layers)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (heads, kv_heads, head_dim)
    assert config.query_pre_attn_scalar == scalar
    assert config.query_scale == pytest.approx({256: 1 / 16, 144: 1 / 12}[scalar], rel=1e-15)
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (50.0, 30.0)
    assert (config.sliding_window, config.max_position_embeddings, config.vocab_size) == (4096, 8192, 256_000)
    assert (config.rope_theta, config.rms_norm_eps) == (10_000.0, 1e-6)
    assert (config.pad_token_id, config.eos_token_id, config.bos_token_id) == (0, 1, 2)


def test_even_layers_are_local_and_the_last_is_global() -> None:
    for config in PRESETS.values():
        assert [config.is_local(index) for index in range(4)] == [True, False, True, False]
        assert not config.is_local(config.num_hidden_layers - 1)


def test_unknown_preset_names_the_presets() -> None:
    with pytest.raises(ConfigError, match=r"no preset is called '27B'; the presets are 2b, 9b, 27b\."):
        preset("27B")
    with pytest.raises(ConfigError, match=r"Did you mean '27b'\?"):
        preset("27bb")


# -- variants -------------------------------------------------------------------------------------------------------


def test_variants_are_settings() -> None:
    multi_head = preset("9b").replace(num_key_value_heads=16)
    assert multi_head.num_queries_per_kv == 1 and preset("9b").num_queries_per_kv == 2
    assert multi_head.kv_cache_bytes(8192) == 2 * preset("9b").kv_cache_bytes(8192)
    wide = preset("9b").replace(num_hidden_layers=26, intermediate_size=24_576)
    assert len(wide.layer_types) == 26
    assert preset("2b").replace(attn_logit_softcapping=None).attn_logit_softcapping is None
    all_global = Gemma2Config(**SMALL, layer_types=(FULL,) * 3)
    assert not any(all_global.is_local(index) for index in range(3))


def test_replace_keeps_given_layer_types_and_refuses_unknown_fields() -> None:
    config = Gemma2Config(**SMALL, layer_types=(FULL, FULL, SLIDING))
    assert config.replace(sliding_window=5).layer_types == (FULL, FULL, SLIDING)
    assert config.replace(num_hidden_layers=2).layer_types == (SLIDING, FULL)
    with pytest.raises(ConfigError, match=r"no field 'sliding_windows'\. Did you mean 'sliding_window'\?"):
        config.replace(sliding_windows=5)


def test_config_is_frozen_and_equal_by_value() -> None:
    config = Gemma2Config(**SMALL)
    with pytest.raises(AttributeError):
        config.hidden_size = 1  # type: ignore[misc]
    assert config == Gemma2Config(**SMALL) and hash(config) == hash(Gemma2Config(**SMALL))


# -- validation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be a whole number of at least 1, but is 0"),
        ({"hidden_size": 48.0}, "hidden_size must be a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a whole number"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers must be a whole number"),
        ({"vocab_size": -1}, "vocab_size must be a whole number"),
        ({"sliding_window": None}, "sliding_window must be a whole number"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be"),
        ({"num_attention_heads": 5}, "must be a multiple of num_key_value_heads.* they are 5 and 2"),
        ({"num_key_value_heads": 8}, "must be a multiple of num_key_value_heads"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be a number above 0"),
        ({"query_pre_attn_scalar": -144}, "query_pre_attn_scalar must be a number above 0"),
        ({"query_pre_attn_scalar": 10**400}, "query_pre_attn_scalar must be a number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number above 0"),
        ({"rope_theta": float("inf")}, "rope_theta must be a number above 0"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers must be at most 10000, .* but is 10000000"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers must be at most 10000"),
        ({"vocab_size": 2**31}, "vocab_size must be at most 2147483647"),
        ({"hidden_size": 10**4000}, "hidden_size must be at most 2147483647, .* but is far more"),
        (
            {"attn_logit_softcapping": 1e-300},
            "attn_logit_softcapping must be a number that float32 holds, .* is 1e-300",
        ),
        ({"final_logit_softcapping": 1e300}, "final_logit_softcapping must be a number that float32 holds"),
        ({"rms_norm_eps": 1e-60}, "rms_norm_eps must be a number that float32 holds"),
        ({"query_pre_attn_scalar": 10**200}, "query_pre_attn_scalar must be a number that float32 holds"),
        ({"initializer_range": "0.02"}, "initializer_range must be a number above 0"),
        ({"attn_logit_softcapping": 0.0}, "attn_logit_softcapping must be a number above 0, or null for no cap"),
        ({"final_logit_softcapping": -30.0}, "final_logit_softcapping must be a number above 0, or null"),
        ({"layer_types": (SLIDING, FULL)}, "must name each of the 3 layers, but names 2"),
        ({"layer_types": "sliding_attention"}, "layer_types must be a list"),
        ({"layer_types": 5}, "layer_types must be a list"),
        ({"layer_types": (SLIDING, FULL, "full_atention")}, r"layer_types\[2\].*Did you mean 'full_attention'\?"),
        ({"layer_types": (SLIDING, FULL, 7)}, r"layer_types\[2\] must be one of"),
        ({"hidden_activation": "relu"}, "hidden_activation must be one of gelu_pytorch_tanh, but is 'relu'"),
        ({"bos_token_id": 64}, r"bos_token_id must be a token id from 0 to 63 \(vocab_size - 1\), but is 64"),
        ({"pad_token_id": -1}, "pad_token_id must be a token id"),
        ({"eos_token_id": 1.0}, "eos_token_id must be a token id"),
    ],
)
def test_what_does_not_make_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Gemma2Config(**{**SMALL, **changes})
    with pytest.raises(ConfigError, match=message):
        Gemma2Config(**SMALL).replace(**changes)
    with pytest.raises(ConfigError, match="some file: .*" + message):
        Gemma2Config.from_dict(hf_json(**changes), source="some file")


def test_every_size_must_be_said() -> None:
    for name in ("hidden_size", "head_dim", "query_pre_attn_scalar", "num_key_value_heads"):
        values = {key: value for key, value in hf_json().items() if key != name}
        with pytest.raises(ConfigError, match=f"config.json: the key '{name}' is missing"):
            Gemma2Config.from_dict(values)


# -- config.json ----------------------------------------------------------------------------------------------------


def test_config_json_comes_back_as_it_was(tmp_path: Path) -> None:
    for index, config in enumerate(
        [
            *PRESETS.values(),
            Gemma2Config(**SMALL, layer_types=(FULL, SLIDING, FULL), attn_logit_softcapping=None, sliding_window=3),
            Gemma2Config(**{**SMALL, "query_pre_attn_scalar": 7.5}, rope_theta=5e5, rms_norm_eps=1e-5),
        ]
    ):
        path = tmp_path / f"{index}.json"
        config.to_json_file(path, dtype="bfloat16")
        assert Gemma2Config.from_json_file(path) == config
        assert json.loads(path.read_text())["torch_dtype"] == "bfloat16"
    assert [path for path in tmp_path.iterdir() if path.suffix != ".json"] == []


def test_transformers_reads_what_we_write(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = Gemma2Config(
        **SMALL, layer_types=(FULL, SLIDING, SLIDING), rope_theta=20_000.0, attn_logit_softcapping=None, eos_token_id=7
    )
    config.to_json_file(tmp_path / "config.json", dtype="bfloat16")
    theirs = transformers.Gemma2Config.from_pretrained(tmp_path)
    for name, value in SMALL.items():
        assert getattr(theirs, name) == value
    assert theirs.layer_types == [FULL, SLIDING, SLIDING]
    assert theirs.rope_parameters["rope_theta"] == 20_000.0
    assert (theirs.attn_logit_softcapping, theirs.final_logit_softcapping) == (None, 30.0)
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.bos_token_id) == (0, 7, 2)
    assert theirs.hidden_activation == "gelu_pytorch_tanh" and theirs.tie_word_embeddings
    assert str(theirs.dtype) == "torch.bfloat16"


def test_we_read_what_transformers_writes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Gemma2Config(
        **SMALL,
        sliding_window=5,
        rope_parameters={"rope_type": "default", "rope_theta": 20_000.0},
        final_logit_softcapping=7.0,
        attn_logit_softcapping=None,
        max_position_embeddings=77,
        rms_norm_eps=1e-5,
        layer_types=[FULL, FULL, SLIDING],
        eos_token_id=[1, 7],
    )
    theirs.save_pretrained(tmp_path)
    ours = Gemma2Config.from_json_file(tmp_path)
    assert ours == Gemma2Config(
        **SMALL,
        sliding_window=5,
        rope_theta=20_000.0,
        final_logit_softcapping=7.0,
        attn_logit_softcapping=None,
        max_position_embeddings=77,
        rms_norm_eps=1e-5,
        layer_types=(FULL, FULL, SLIDING),
    )


def test_transformers_defaults_are_the_2b_but_for_its_scalar(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.Gemma2Config(intermediate_size=9216).save_pretrained(tmp_path)
    assert Gemma2Config.from_json_file(tmp_path) == preset("2b")


def test_early_published_files_are_read() -> None:
    # As google/gemma-2-27b had it: hidden_act beside hidden_activation, no layer_types, rope_theta at the top.
    values = hf_json(
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
        cache_implementation="hybrid",
        sliding_window_size=4096,
        rope_theta=10000.0,
        transformers_version="4.42.0.dev0",
        torch_dtype="float32",
        use_cache=True,
        attention_bias=False,
        attention_dropout=0.0,
    )
    assert Gemma2Config.from_dict(values) == Gemma2Config(**SMALL)
    assert Gemma2Config.from_dict(hf_json(hidden_act="gelu")) == Gemma2Config(**SMALL)
    assert Gemma2Config.from_dict(hf_json(hidden_act="gelu", hidden_activation=None)) == Gemma2Config(**SMALL)
    assert Gemma2Config.from_dict(hf_json(layer_types=None, pad_token_id=None)) == Gemma2Config(**SMALL)


def test_rope_theta_is_read_where_each_version_writes_it() -> None:
    assert Gemma2Config.from_dict(hf_json(rope_theta=5e5)).rope_theta == 5e5
    later = hf_json(rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    assert Gemma2Config.from_dict(later).rope_theta == 5e5
    assert Gemma2Config.from_dict(hf_json(rope_scaling=None, rope_parameters=None)).rope_theta == 10_000.0


def test_a_list_of_stop_tokens_gives_its_first() -> None:
    assert Gemma2Config.from_dict(hf_json(eos_token_id=[1, 7])).eos_token_id == 1
    with pytest.raises(ConfigError, match="eos_token_id is an empty list"):
        Gemma2Config.from_dict(hf_json(eos_token_id=[]))
    with pytest.raises(ConfigError, match="eos_token_id must be a token id"):
        Gemma2Config.from_dict(hf_json(eos_token_id=["<eos>"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma3_text"}, "model_type must be 'gemma2', but is 'gemma3_text'"),
        ({"attention_bias": True}, "attention_bias is true, but Gemma 2 has no biases"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is false"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling asks for scaled RoPE"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object or null, but is 'linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters asks for scaled RoPE"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "turns a part of each head"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "differs by layer type"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta must be a number above 0"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
        ({"hidden_act": "silu"}, "hidden_act must be gelu_pytorch_tanh, but is 'silu'"),
        ({"hidden_activation": "gelu"}, "hidden_activation must be one of gelu_pytorch_tanh, but is 'gelu'"),
    ],
)
def test_what_gemma_2_cannot_express_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Gemma2Config.from_dict(hf_json(**changes))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"[1, 2]", "must hold one JSON object, but holds a list"),
        (b"\xff\xfe", "cannot be read"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "is not valid JSON|hidden_size|missing"),
        (b"[" * 100_000, "is not valid JSON"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(Gemma2Error, match=message) as caught:
        Gemma2Config.from_json_file(tmp_path)
    assert str(path) in str(caught.value)


def test_a_missing_file_says_what_was_needed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: no such file; a model folder needs its config\.json"):
        Gemma2Config.from_json_file(tmp_path)


def test_written_numbers_have_the_types_that_transformers_asks_for() -> None:
    config = preset("2b").replace(
        query_pre_attn_scalar=7.0, attn_logit_softcapping=50, final_logit_softcapping=None, rms_norm_eps=1
    )
    values = config.to_dict()
    assert isinstance(values["query_pre_attn_scalar"], int)
    assert isinstance(values["attn_logit_softcapping"], float)
    assert values["final_logit_softcapping"] is None
    assert isinstance(values["rms_norm_eps"], float)
    assert Gemma2Config.from_dict(values) == config
    transformers = pytest.importorskip("transformers")
    values.pop("architectures")
    assert transformers.Gemma2Config(**values).query_pre_attn_scalar == 7
