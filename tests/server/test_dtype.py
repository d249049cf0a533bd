"""Which data type a CPU computes in, and what is said of it."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from conserve.server.errors import BadInputError
from conserve.server.start import dtype
from conserve.server.start.amounts import GIB
from conserve.server.start.dtype import ModelFacts, check_fits, choose, multiplies_bfloat16

BILLION = ModelFacts("one-billion", 1 << 30)


@pytest.mark.parametrize(
    ("capabilities", "max_isa", "multiplies"),
    [
        ({"avx2", "fma3"}, "", False),
        ({"avx2", "avx512_f", "avx512_vnni"}, "", False),
        ({"avx2", "avx512_f", "avx512_bf16"}, "", True),
        ({"avx2", "amx_bf16", "amx_tile"}, "", True),
        ({"neon", "bf16"}, "", True),
        ({"avx512_bf16"}, "AVX2", False),
        ({"avx512_bf16"}, "avx512_core_vnni", False),
        ({"avx512_bf16"}, "avx512_core_bf16", True),
        ({"amx_bf16"}, "AVX10_1_512_AMX", True),
        ({"avx512_bf16"}, "default", True),
    ],
    ids=lambda value: "-".join(sorted(value)) if isinstance(value, set) else str(value),
)
def test_what_multiplies_bfloat16(capabilities: set[str], max_isa: str, multiplies: bool) -> None:
    assert multiplies_bfloat16(frozenset(capabilities), max_isa) == multiplies


@pytest.mark.parametrize("multiplies", [True, False])
def test_the_users_type_stays(multiplies: bool) -> None:
    choice = choose("half", BILLION, multiplies=multiplies)
    assert (choice.dtype, choice.num_bytes) == ("half", 2)
    assert choose("float", BILLION, multiplies=multiplies).num_bytes == 4


def test_bfloat16_where_the_processor_multiplies_it() -> None:
    assert choose("auto", BILLION, multiplies=True).dtype == "bfloat16"


def test_float32_elsewhere_with_what_it_costs() -> None:
    choice = choose("auto", BILLION, multiplies=False)
    assert (choice.dtype, choice.num_bytes) == ("float32", 4)
    assert "4.0 GiB of weights instead of 2.0 GiB" in choice.words
    assert "float32" in choose("auto", ModelFacts("unknown"), multiplies=False).words


def test_kernels_that_know_bfloat16_only_keep_it() -> None:
    facts = ModelFacts("gated-delta", 1 << 30, bfloat16_only=True)
    assert choose("auto", facts, multiplies=False).dtype == "bfloat16"


@pytest.mark.parametrize("multiplies", [True, False])
def test_quantised_weights_are_left_to_vllm(multiplies: bool) -> None:
    facts = ModelFacts("awq", 1 << 30, quantized=True)
    assert choose("auto", facts, multiplies=multiplies).dtype == "auto"


def test_a_model_that_only_float32_makes_too_large_is_refused_by_name() -> None:
    wide = choose("auto", BILLION, multiplies=False)
    with pytest.raises(BadInputError, match=r"'one-billion' has 4\.0 GiB .* in float32"):
        check_fits(BILLION, wide, 3 * GIB)
    check_fits(BILLION, wide, 5 * GIB)
    check_fits(BILLION, choose("auto", BILLION, multiplies=True), 3 * GIB)
    check_fits(ModelFacts("unknown"), wide, 0)


def test_a_model_too_large_in_any_type_is_vllms_to_refuse() -> None:
    check_fits(BILLION, choose("auto", BILLION, multiplies=False), GIB)


def arguments(folder: Path, **config: Any) -> Namespace:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return Namespace(
        model_tag=str(folder),
        served_model_name=None,
        quantization=None,
        hf_overrides={},
        trust_remote_code=False,
        revision=None,
        code_revision=None,
        config_format="auto",
    )


@pytest.mark.engine
class TestFacts:
    def test_weights_are_counted_from_their_headers(self, tmp_path: Path) -> None:
        torch = pytest.importorskip("torch")
        from safetensors.torch import save_file

        save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, tmp_path / "model.safetensors")
        facts = dtype.facts_of(arguments(tmp_path))
        assert facts == ModelFacts(str(tmp_path), 22)

    def test_weights_in_another_format_are_not_counted(self, tmp_path: Path) -> None:
        (tmp_path / "pytorch_model.bin").write_bytes(b"weights")
        assert dtype.facts_of(arguments(tmp_path)).num_parameters is None

    def test_quantised_weights_are_seen(self, tmp_path: Path) -> None:
        args = arguments(tmp_path, quantization_config={"quant_method": "awq", "bits": 4})
        assert dtype.facts_of(args).quantized

    def test_gated_delta_nets_are_seen(self, tmp_path: Path) -> None:
        layers = ["linear_attention", "full_attention"]
        args = arguments(tmp_path, model_type="qwen3_next", layer_types=layers, num_hidden_layers=2)
        assert dtype.facts_of(args).bfloat16_only
        assert not dtype.facts_of(arguments(tmp_path)).bfloat16_only

    def test_a_configuration_that_cannot_be_read_is_left_to_vllm(self, tmp_path: Path) -> None:
        args = arguments(tmp_path, model_type="no-such-model")
        assert dtype.facts_of(args) == ModelFacts(str(tmp_path))
