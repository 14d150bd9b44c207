"""A slow transformer in NumPy float64, one number at a time, from the papers' formulas: the oracle of test_model.py.

Nothing here is shared with jaxgpt/model.py but the config and the names of parameters and intermediates.
"""

import cmath
import math

import numpy as np

OUTPUT = ("unembed", "read_out")


def forward(c, params, inputs, key_mask=None):
    """Outputs [B, T, V] and every intermediate by name, from parameters by dotted name."""
    runs = [
        _sequence(c, params, row, [True] * len(row) if key_mask is None else list(key_mask[b]))
        for b, row in enumerate(inputs)
    ]
    outputs = np.stack([out for out, _ in runs])
    return outputs, {name: np.stack([seen[name] for _, seen in runs]) for name in runs[0][1]}


def _sequence(c, params, row, key_mask):
    seen = {}

    def linear(name, x):
        y = np.array([sum(x[i] * w for i, w in enumerate(column)) for column in params[f"{name}.kernel"].T])
        assert (f"{name}.bias" in params) == (c.bias if name not in OUTPUT or c.output_bias is None else c.output_bias)
        return y + params[f"{name}.bias"] if f"{name}.bias" in params else y

    def norm(name, xs):
        return [_norm(c, x, params.get(f"{name}.scale"), params.get(f"{name}.bias")) for x in xs]

    xs = []
    for t, token in enumerate(row):
        x = linear("read_in", token) if c.d_input else params["embed.embedding"][token].copy()
        if c.positions == "learned":
            x = x + params["position.embedding"][t]
        if c.positions == "sinusoidal":
            x = x + np.array([_sinusoid(t, j, c.d_model) for j in range(c.d_model)])
        xs.append(x)
    seen["embedding"] = np.array(xs)

    for i in range(c.n_layers):
        layer = f"layers.{i}."
        # Post-norm: Vaswani et al. 2017; pre-norm: Xiong et al. 2020, figure 1; parallel: GPT-NeoX, equation 2.
        seen[layer + "residual"] = np.array(xs)
        into_attention = xs if c.norm_placement == "post" else norm(layer + "attention_norm", xs)
        after_attention = [
            x + a for x, a in zip(xs, _attention(c, params, layer, linear, into_attention, key_mask, seen), strict=True)
        ]
        if c.norm_placement == "post":
            after_attention = norm(layer + "attention_norm", after_attention)
        if c.norm_placement != "parallel":
            seen[layer + "residual_mid"] = np.array(after_attention)
        if c.mlp == "none":
            xs = after_attention
            continue
        if c.norm_placement == "post":
            into_mlp = after_attention
        else:
            into_mlp = norm(layer + "mlp_norm", xs if c.norm_placement == "parallel" else after_attention)
        xs = [x + m for x, m in zip(after_attention, _mlp(c, layer, linear, into_mlp, seen), strict=True)]
        if c.norm_placement == "post":
            xs = norm(layer + "mlp_norm", xs)

    if c.norm_placement != "post":
        xs = norm("final_norm", xs)
    seen["final"] = np.array(xs)
    wider = c.d_model / c.base_width if c.parametrization == "mup" else 1  # Yang et al. 2022, table 8
    xs = [x / wider for x in xs]
    if c.d_output:
        return np.array([linear("read_out", x) for x in xs]), seen
    if c.tie_output:
        logits = np.array([[x @ e for e in params["embed.embedding"]] for x in xs])
    else:
        logits = np.array([linear("unembed", x) for x in xs])
    return c.logit_cap * np.tanh(logits / c.logit_cap) if c.logit_cap else logits, seen


def _attention(c, params, layer, linear, xs, key_mask, seen):
    length, width = len(xs), c.d_head or c.d_model // c.n_heads
    q, k, v = (
        [linear(f"{layer}attention.{part}", x).reshape(-1, width) for x in xs] for part in ("query", "key", "value")
    )
    assert (len(q[0]), len(k[0]), len(v[0])) == (c.n_heads, *[c.n_kv_heads or c.n_heads] * 2)
    shared = c.n_heads // len(k[0])  # Ainslie et al. 2023, figure 2: so many query heads read one head of keys
    k, v = ([[x[h // shared] for h in range(c.n_heads)] for x in xs] for xs in (k, v))
    if c.qk_norm:
        q, k = (
            [[_rms(c, x, params[f"{layer}attention.{part}_norm.scale"]) for x in heads] for heads in all_heads]
            for part, all_heads in (("query", q), ("key", k))
        )
    scale = 1 / math.sqrt(width)
    if c.parametrization == "mup" and not c.d_head:  # 1 / width, and the usual one at the base width
        scale = math.sqrt(c.base_width / c.n_heads) / width
    pattern = np.zeros((c.n_heads, length, length))
    heads = np.zeros((length, c.n_heads, width))
    for h in range(c.n_heads):
        for t in range(length):
            visible = [s for s in range(length) if key_mask[s] and (s <= t or not c.causal)]
            if not visible:
                continue
            for s in visible:
                turned = c.positions == "rope"
                a, b = (_turn(c, q[t][h], t), _turn(c, k[s][h], s)) if turned else (q[t][h], k[s][h])
                pattern[h, t, s] = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
            if c.attention == "linear":  # Katharopoulos et al. 2020 without feature map, over the mean
                pattern[h, t] /= len(visible)
            else:
                scores = pattern[h, t, visible] * scale
                if c.positions == "alibi":
                    scores -= [_slope(h, c.n_heads) * abs(t - s) for s in visible]
                pattern[h, t, visible] = np.exp(scores) / np.exp(scores).sum()
            heads[t, h] = sum(pattern[h, t, s] * v[s][h] for s in visible)
    out = [linear(layer + "attention.out", heads[t].reshape(-1)) for t in range(length)]
    seen[layer + "attention.pattern"] = pattern
    seen[layer + "attention.heads"] = heads
    seen[layer + "attention.out"] = np.array(out)
    return out


ACTIVATIONS = {
    "gelu": lambda x: _gelu(x),
    "gelu_exact": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
    "swiglu": lambda x: x / (1 + math.exp(-x)),
}


def _mlp(c, layer, linear, xs, seen):
    act = ACTIVATIONS[c.mlp]
    pres = [linear(f"{layer}mlp.{'gate' if c.mlp == 'swiglu' else 'up'}", x) for x in xs]
    hidden = [np.array([act(float(p)) for p in pre]) for pre in pres]
    if c.mlp == "swiglu":
        hidden = [h * linear(layer + "mlp.up", x) for h, x in zip(hidden, xs, strict=True)]
    out = [linear(layer + "mlp.down", h) for h in hidden]
    seen[layer + "mlp.pre"], seen[layer + "mlp.hidden"] = np.array(pres), np.array(hidden)
    seen[layer + "mlp.out"] = np.array(out)
    return out


def _gelu(x):
    """Hendrycks & Gimpel 2016, the approximation with tanh."""
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _norm(c, x, scale, bias):
    """Ba et al. 2016; Zhang & Sennrich 2019."""
    if c.norm == "none":
        return x
    mean = sum(x) / len(x) if c.norm == "layernorm" else 0.0
    y = (x - mean) / math.sqrt(sum((x - mean) ** 2) / len(x) + c.norm_epsilon) * scale
    return y if bias is None else y + bias


def _rms(c, x, scale):
    return x / math.sqrt(sum(x**2) / len(x) + c.norm_epsilon) * scale


def _sinusoid(t, j, width):
    """Vaswani et al. 2017, section 3.5."""
    angle = t / 10_000 ** (2 * (j // 2) / width)
    return math.cos(angle) if j % 2 else math.sin(angle)


def _turn(c, x, t):
    """Su et al. 2021, equation 13: pairs (i, i + R/2) of the first R numbers as complex ones, turned by t theta_i."""
    half = math.floor(c.rope_fraction * len(x) / 2)
    turned = [complex(x[i], x[i + half]) * cmath.exp(1j * t * c.rope_base ** (-i / half)) for i in range(half)]
    return [z.real for z in turned] + [z.imag for z in turned] + list(x[2 * half :])


def _slope(h, n_heads):
    """Press et al. 2022, section 3, and their code for a number of heads that is no power of two."""
    if n_heads & (n_heads - 1) == 0:
        return (2 ** (-8 / n_heads)) ** (h + 1)
    lower = 1 << (n_heads.bit_length() - 1)
    return _slope(h, lower) if h < lower else _slope(2 * (h - lower), 2 * lower)
