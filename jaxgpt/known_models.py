"""Published language models as configs, each with its published number of parameters: what flops.py is held to."""

from __future__ import annotations

from dataclasses import dataclass

from jaxgpt.config import ModelConfig


@dataclass(frozen=True)
class KnownModel:
    """A published model, its published number of parameters, and half the last digit that was published."""

    config: ModelConfig
    published: int
    rounding: int  # the true count is within published +- rounding; 0: every digit is known
    source: str


def _gpt2(
    n_layers: int, d_model: int, n_heads: int, published: int, rounding: int, source: str, context: int = 1024
) -> KnownModel:
    config = ModelConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        context=context,
        vocab_size=50_257,
        positions="learned",
        bias=True,
        tie_output=True,
    )
    return KnownModel(config, published, rounding, source)


def _gpt3(n_layers: int, d_model: int, n_heads: int, published: int, rounding: int) -> KnownModel:
    source = "Brown et al. 2020, tables 2.1 and D.1"
    return _gpt2(n_layers, d_model, n_heads, published, rounding, source, context=2048)


def _llama2(
    n_layers: int, d_model: int, n_heads: int, d_mlp: int, published: int, n_kv_heads: int | None = None
) -> KnownModel:
    config = ModelConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_mlp=d_mlp,
        context=4096,
        vocab_size=32_000,
        norm="rmsnorm",
        mlp="swiglu",
    )
    return KnownModel(config, published, 0, "Touvron et al. 2023b; the released weights")


def _pythia(n_layers: int, d_model: int, n_heads: int, published: int, vocab_size: int = 50_304) -> KnownModel:
    # The vocabulary is 50,254 ids, rounded up so that it divides among the devices that the model was trained on.
    config = ModelConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        context=2048,
        vocab_size=vocab_size,
        positions="rope",
        rope_fraction=0.25,
        norm_placement="parallel",
        mlp="gelu_exact",
        bias=True,
        output_bias=False,
    )
    return KnownModel(config, published, 0, "Biderman et al. 2023; the released weights")


def _mixtral(n_layers: int, d_model: int, n_heads: int, d_mlp: int, context: int, published: int) -> KnownModel:
    config = ModelConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=8,
        d_mlp=d_mlp,
        context=context,
        vocab_size=32_000,
        rope_base=1e6,
        norm="rmsnorm",
        mlp="swiglu",
        n_experts=8,
        experts_per_token=2,
    )
    return KnownModel(config, published, 0, "Jiang et al. 2024; the released weights")


_GPT2 = "Radford et al. 2019; the released weights"
_MILLION = 10**6

# GPT-3 has 96 layers of 96 heads, 9,216 heads in all, and a context of 2048.
# Left out because this model cannot express them: Chinchilla and Gopher (relative positions with a matrix per layer),
# GPT-J (biases in some maps only). Left out because its table contradicts itself: GPT-3 XL (24 heads of 128 are not
# d_model = 2048) and 13B (40 of 128 are not 5140).
KNOWN_MODELS: dict[str, KnownModel] = {
    "gpt2": _gpt2(12, 768, 12, 124_439_808, 0, _GPT2),
    "gpt2-medium": _gpt2(24, 1024, 16, 354_823_168, 0, _GPT2),
    "gpt2-large": _gpt2(36, 1280, 20, 774_030_080, 0, _GPT2),
    "gpt2-xl": _gpt2(48, 1600, 25, 1_557_611_200, 0, _GPT2),
    "gpt3-small": _gpt3(12, 768, 12, 125 * _MILLION, _MILLION // 2),
    "gpt3-medium": _gpt3(24, 1024, 16, 356 * _MILLION, _MILLION // 2),
    "gpt3-large": _gpt3(24, 1536, 16, 760 * _MILLION, _MILLION // 2),
    "gpt3-2.7b": _gpt3(32, 2560, 32, 2_650 * _MILLION, 5 * _MILLION),
    "gpt3-6.7b": _gpt3(32, 4096, 32, 6_660 * _MILLION, 5 * _MILLION),
    "gpt3": _gpt3(96, 12_288, 96, 174_600 * _MILLION, 50 * _MILLION),
    "llama2-7b": _llama2(32, 4096, 32, 11_008, 6_738_415_616),
    "llama2-13b": _llama2(40, 5120, 40, 13_824, 13_015_864_320),
    "llama2-70b": _llama2(80, 8192, 64, 28_672, 68_976_648_192, n_kv_heads=8),
    "mixtral-8x7b": _mixtral(32, 4096, 32, 14_336, 32_768, 46_702_792_704),
    "mixtral-8x22b": _mixtral(56, 6144, 48, 16_384, 65_536, 140_620_634_112),
    "pythia-70m": _pythia(6, 512, 8, 70_426_624),
    "pythia-160m": _pythia(12, 768, 12, 162_322_944),
    "pythia-410m": _pythia(24, 1024, 16, 405_334_016),
    "pythia-1b": _pythia(16, 2048, 8, 1_011_781_632),
    "pythia-1.4b": _pythia(24, 2048, 16, 1_414_647_808),
    "pythia-2.8b": _pythia(32, 2560, 32, 2_775_208_960),
    "pythia-6.9b": _pythia(32, 4096, 32, 6_857_302_016, vocab_size=50_432),
    "pythia-12b": _pythia(36, 5120, 40, 11_846_072_320, vocab_size=50_688),
}
