"""LoRA: the algebra against NumPy, and what stacking, removing and weighing promise."""

import itertools
from dataclasses import replace

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict

from sdjax.errors import CheckpointError, RequestError
from sdjax.loading import apply_lora, lora_merger, read_lora
from sdjax.loading.lora_names import original_names
from tests.loading.lora_files import TEXT, kohya, new_diffusers, random_layers, weights_of, write
from tests.loading.tiny_params import tiny_params

UNET = {"unet": ("to_q", "to_out.0", "conv1")}
BOTH = {**UNET, "text_encoder": TEXT}


@pytest.fixture(scope="module")
def params():
    return tiny_params("sd")


@pytest.fixture(scope="module")
def xl_params():
    return tiny_params("xl")


def adapter_of(params, folder, *, seed=0, endings=UNET, dora=False):
    layers = random_layers(params, endings, seed=seed)
    tensors = new_diffusers(layers)
    if dora:
        tensors |= {f"unet.{x.name}.lora_magnitude_vector": np.full(len(x.up), 0.5, np.float32) for x in layers}
    return read_lora(write(tensors, folder / f"{seed}.safetensors"), params)


def bytes_of(params):
    return {path: np.asarray(leaf).tobytes() for path, leaf in flatten_dict(params).items()}


def kron(a, b):
    a, b = (x.reshape(*x.shape, *(1,) * (max(a.ndim, b.ndim) - x.ndim)) for x in (a, b))
    return np.kron(a, b)


def test_every_kind_of_layer_and_factor_is_what_numpy_makes_of_it(xl_params, tmp_path):
    rng = np.random.default_rng(1)
    tensors, expected = {}, {}
    weights = weights_of(xl_params)

    def part(*shape):
        return (0.5 * rng.normal(size=shape)).astype(np.float32)

    def add(key, layer, delta, alpha=None, rank=1, **parts):
        for name, tensor in parts.items():
            tensors[f"{key}.{name.replace('__', '.')}"] = tensor
        if alpha is not None:
            tensors[f"{key}.alpha"] = np.float32(alpha)
        scale = 1.0 if alpha is None else alpha / rank
        expected[layer] = weights[layer] + 0.5 * scale * np.asarray(delta).reshape(weights[layer].shape)

    def lora(key, layer, rank, alpha, up_tail=(), down_tail=(), out=None):
        out, width = weights[layer].shape[:2]
        up, down = part(out, rank, *up_tail), part(rank, width, *down_tail)
        delta = np.tensordot(up.reshape(out, rank), down, 1)
        add(key, layer, delta, alpha, rank, lora_up__weight=up, lora_down__weight=down)

    block = "unet.down_blocks.1.attentions.0.transformer_blocks.0"
    kohya_block = "lora_unet_input_blocks_3_1_transformer_blocks_0"
    lora(f"{kohya_block}_attn1_to_q", f"{block}.attn1.to_q", 3, 1.5)
    lora(f"{kohya_block}_attn1_to_k", f"{block}.attn1.to_k", 2, None)
    lora(f"{kohya_block}_ff_net_0_proj", f"{block}.ff.net.0.proj", 5, 4.0)
    # a linear layer stored as a pointwise convolution, and the reverse
    lora("lora_unet_input_blocks_3_1_proj_in", "unet.down_blocks.1.attentions.0.proj_in", 4, 2.0, (1, 1), (1, 1))
    lora("lora_unet_input_blocks_3_0_skip_connection", "unet.down_blocks.1.resnets.0.conv_shortcut", 4, 2.0)
    lora("lora_unet_input_blocks_1_0_in_layers_2", "unet.down_blocks.0.resnets.0.conv1", 4, 1.0, (1, 1), (3, 3))
    lora("lora_unet_input_blocks_2_0_op", "unet.down_blocks.0.downsamplers.0.conv", 2, 1.0, (1, 1), (3, 3))
    lora("lora_unet_output_blocks_1_2_conv", "unet.up_blocks.0.upsamplers.0.conv", 2, 8.0, (1, 1), (3, 3))
    lora("lora_unet_middle_block_2_emb_layers_1", "unet.mid_block.resnets.1.time_emb_proj", 3, 3.0)
    lora("lora_unet_time_embed_2", "unet.time_embedding.linear_2", 3, 1.0)
    lora("lora_unet_label_emb_0_0", "unet.add_embedding.linear_1", 3, 1.0)
    lora("lora_unet_input_blocks_0_0", "unet.conv_in", 2, 1.0, (1, 1), (3, 3))
    lora("lora_unet_out_2", "unet.conv_out", 2, 1.0, (1, 1), (3, 3))
    lora("lora_te1_text_model_encoder_layers_0_mlp_fc1", "text_encoder.text_model.encoder.layers.0.mlp.fc1", 2, 1.0)
    lora("lora_te2_text_projection", "text_encoder_2.text_projection", 2, 1.0)
    # LoCon with a core
    layer = "unet.up_blocks.0.resnets.0.conv1"
    out, width, *_ = weights[layer].shape
    up, mid, down = part(out, 4, 1, 1), part(4, 4, 3, 3), part(4, width, 1, 1)
    delta = np.einsum("or,rshw,si->oihw", up[..., 0, 0], mid, down[..., 0, 0])
    add("lora_unet_output_blocks_0_0_in_layers_2", layer, delta, 2.0, 4)
    tensors |= {
        f"lora_unet_output_blocks_0_0_in_layers_2.lora_{name}.weight": tensor
        for name, tensor in (("up", up), ("mid", mid), ("down", down))
    }
    # LoHa: matrices for a linear layer, and with cores for a convolution (LyCORIS keeps the first transposed there)
    layer = f"{block}.attn2.to_v"
    out, width = weights[layer].shape
    a, b, c, d = part(out, 3), part(3, width), part(out, 3), part(3, width)
    add(
        f"{kohya_block}_attn2_to_v",
        layer,
        (a @ b) * (c @ d),
        6.0,
        3,
        hada_w1_a=a,
        hada_w1_b=b,
        hada_w2_a=c,
        hada_w2_b=d,
    )
    layer = "unet.mid_block.resnets.0.conv1"
    out, width, *_ = weights[layer].shape
    a, b, c, d, t, u = part(2, out), part(2, width), part(2, out), part(2, width), part(2, 2, 3, 3), part(2, 2, 3, 3)
    cores = [np.einsum("ijkl,jr,ip->prkl", core, y, x) for core, x, y in ((t, a, b), (u, c, d))]
    loha = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "hada_t1": t, "hada_t2": u}
    add("lora_unet_middle_block_0_in_layers_2", layer, cores[0] * cores[1], 1.0, 2, **loha)
    # LoKr: whole, with a product, and on a convolution; where both are whole, alpha has no meaning
    layer = f"{block}.attn2.to_q"
    out, width = weights[layer].shape
    a, b = part(4, 2), part(out // 4, width // 2)
    add(f"{kohya_block}_attn2_to_q", layer, np.kron(a, b), lokr_w1=a, lokr_w2=b)
    tensors[f"{kohya_block}_attn2_to_q.alpha"] = np.float32(123)
    layer = f"{block}.attn2.to_out.0"
    a, b, c = part(4, 4), part(out // 4, 2), part(2, width // 4)
    add(f"{kohya_block}_attn2_to_out_0", layer, np.kron(a, b @ c), 1.0, 2, lokr_w1=a, lokr_w2_a=b, lokr_w2_b=c)
    layer = "unet.mid_block.resnets.1.conv1"
    out, width, *_ = weights[layer].shape
    a, b = part(2, 2), part(out // 2, width // 2, 3, 3)
    add("lora_unet_middle_block_2_in_layers_2", layer, kron(a, b), lokr_w1=a, lokr_w2=b)

    adapter = read_lora(write(tensors, tmp_path / "all.safetensors"), xl_params)
    merged = weights_of(apply_lora(xl_params, [(adapter, 0.5)]))
    assert not adapter.unused
    assert {name for name in merged if not np.array_equal(merged[name], weights[name])} == expected.keys()
    for name, weight in expected.items():
        np.testing.assert_allclose(merged[name], weight, atol=1e-5 * np.abs(weight).max(), err_msg=name)


@pytest.mark.parametrize("axis", ["output", "output as a vector", "input"])
@pytest.mark.parametrize(
    "layer", ["mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "down_blocks.0.resnets.0.conv2"]
)
def test_kohyas_dora_scale_is_the_norm_along_the_axis_that_its_shape_tells(params, tmp_path, axis, layer):
    rng = np.random.default_rng(2)
    weight = weights_of(params)[f"unet.{layer}"]
    out, width, *window = weight.shape
    up, down = (rng.normal(size=s).astype(np.float32) for s in ((out, 2, *[1] * len(window)), (2, width, *window)))
    summed = weight + 0.7 * np.tensordot(up.reshape(out, 2), down, 1)
    ones = [1] * len(window)
    shape, axes = ((1, width, *ones), (0, 2, 3)) if axis == "input" else ((out, 1, *ones), (1, 2, 3))
    magnitude = rng.uniform(0.5, 2, shape).astype(np.float32)
    norm = np.sqrt(np.square(summed).sum(axes[: weight.ndim - 1], keepdims=True))
    key = f"lora_unet_{layer.replace('.', '_')}"
    tensors = {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
    tensors[f"{key}.dora_scale"] = magnitude.reshape(-1) if "vector" in axis else magnitude
    merged = apply_lora(params, [(read_lora(write(tensors, tmp_path / "dora.safetensors"), params), 0.7)])
    np.testing.assert_allclose(weights_of(merged)[f"unet.{layer}"], magnitude * summed / norm, rtol=2e-5, atol=1e-6)


def test_alphas_and_ranks_may_differ_from_layer_to_layer(params, tmp_path):
    layers = random_layers(params, BOTH, ranks=(1, 4, 7), alphas=(None, 1.0, 16.0, 0.5))
    merged = weights_of(
        apply_lora(params, [(read_lora(write(kohya(layers), tmp_path / "x.safetensors"), params), 1.0)])
    )
    before = weights_of(params)
    for layer in layers:
        name = f"{layer.component}.{layer.name}"
        np.testing.assert_allclose(merged[name], before[name] + layer.delta.reshape(before[name].shape), atol=3e-5)


def test_a_lora_on_token_embeddings_adds_to_their_rows(params, tmp_path):
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, 20)).astype(np.float32), rng.normal(size=(32, 2)).astype(np.float32)
    key = "text_encoder.text_model.embeddings.token_embedding"
    file = write({f"{key}.lora_embedding_A": a, f"{key}.lora_embedding_B": b}, tmp_path / "x.safetensors")
    merged = weights_of(apply_lora(params, [(read_lora(file, params), 1.0)]))
    np.testing.assert_allclose(merged[key], weights_of(params)[key] + (b @ a).T, atol=1e-5)


def test_the_original_layouts_names_are_those_of_published_models():
    known = {
        "sd": {
            "down_blocks.0.attentions.0.proj_in": "input_blocks.1.1.proj_in",
            "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
            "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
            "down_blocks.3.resnets.1.conv2": "input_blocks.11.0.out_layers.3",
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_k": "middle_block.1.transformer_blocks.0.attn2.to_k",
            "mid_block.resnets.1.time_emb_proj": "middle_block.2.emb_layers.1",
            "up_blocks.0.upsamplers.0.conv": "output_blocks.2.1.conv",
            "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
            "up_blocks.3.attentions.2.proj_out": "output_blocks.11.1.proj_out",
            "conv_out": "out.2",
        },
        "xl": {
            "down_blocks.1.attentions.0.transformer_blocks.1.norm3": "input_blocks.4.1.transformer_blocks.1.norm3",
            "down_blocks.2.attentions.1.proj_in": "input_blocks.8.1.proj_in",
            "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
            "up_blocks.1.attentions.2.proj_in": "output_blocks.5.1.proj_in",
            "up_blocks.2.resnets.2.conv1": "output_blocks.8.0.in_layers.2",
            "add_embedding.linear_2": "label_emb.0.2",
        },
    }
    xl = {
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 2],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    for name, config in (("sd", {"cross_attention_dim": 768}), ("xl", xl)):
        with torch.device("meta"):
            model = diffusers.UNet2DConditionModel(**config)
        layers = {key.rpartition(".")[0] for key in model.state_dict()}
        names = original_names(layers)
        assert known[name].items() <= names.items()
        assert names.keys() == layers
        assert len(set(names.values())) == len(layers)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_after_an_adapter_the_model_is_what_it_was(dtype, tmp_path):
    params = tiny_params("sd", dtype)
    before = bytes_of(params)
    one, other = (adapter_of(params, tmp_path, seed=seed, endings=BOTH) for seed in (1, 2))
    merged_one = bytes_of(apply_lora(params, [(one, 1.0)]))
    assert merged_one != before
    apply_lora(params, [(other, 0.5)])
    apply_lora(params, [(one, 1.0), (other, 0.5)])
    assert apply_lora(params, []) is params
    assert bytes_of(params) == before
    assert bytes_of(apply_lora(params, [(one, 1.0)])) == merged_one


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_merged_weight_is_the_exact_sum_rounded_once(dtype, tmp_path):
    params = tiny_params("sd", dtype)
    layers = random_layers(params, UNET)
    adapter = read_lora(write(new_diffusers(layers), tmp_path / "x.safetensors"), params)
    before, merged = weights_of(params), weights_of(apply_lora(params, [(adapter, 0.3), (adapter, 0.2)]))
    for layer in layers:
        weight = before[f"unet.{layer.name}"]
        exact = weight.astype(np.float64) + 0.5 * layer.delta.reshape(weight.shape).astype(np.float64)
        got = merged[f"unet.{layer.name}"].astype(np.float64)
        assert merged[f"unet.{layer.name}"].dtype == weight.dtype
        half_a_step = 0.5 * float(jnp.finfo(dtype).eps) * np.abs(exact)
        assert (np.abs(got - exact) <= half_a_step + 2e-6).all()


def test_what_no_adapter_touches_is_the_same_array(params, tmp_path):
    adapter = adapter_of(params, tmp_path)
    merged = apply_lora(params, [(adapter, 1.0)])
    before, after = flatten_dict(params), flatten_dict(merged)
    assert before.keys() == after.keys()
    assert jax.tree.structure(params) == jax.tree.structure(merged)
    for path, leaf in before.items():
        assert (after[path] is leaf) == (path not in adapter.changes)
        assert (after[path].shape, after[path].dtype, after[path].sharding) == (leaf.shape, leaf.dtype, leaf.sharding)


def test_the_result_is_immutable(params, tmp_path):
    merged = apply_lora(params, [(adapter_of(params, tmp_path), 1.0)])
    with pytest.raises(ValueError, match="immutable"):
        merged["unet"]["conv_in"]["weight"] = 0


def test_weight_zero_is_no_adapter_at_all(params, tmp_path):
    for dora in (False, True):
        adapter = adapter_of(params, tmp_path, dora=dora)
        assert apply_lora(params, [(adapter, 0.0)]) is params
        assert apply_lora(params, [(adapter, 0.5), (adapter, -0.5)]) is params


@pytest.mark.parametrize("dora", [False, True])
def test_the_order_of_adapters_does_not_matter(params, tmp_path, dora):
    adapters = [(adapter_of(params, tmp_path, seed=i, dora=dora), w) for i, w in enumerate((1.0, -0.5, 0.25))]
    results = [flatten_dict(apply_lora(params, order)) for order in itertools.permutations(adapters)]
    for other in results[1:]:
        for path, leaf in results[0].items():
            np.testing.assert_allclose(other[path], leaf, atol=3e-6)


@pytest.mark.parametrize("dora", [False, True])
def test_one_file_twice_is_the_file_once_with_the_sum_of_weights(params, tmp_path, dora):
    adapter, again = (adapter_of(params, tmp_path, dora=dora) for _ in range(2))
    twice, once = apply_lora(params, [(adapter, 0.5), (again, 0.25)]), apply_lora(params, [(adapter, 0.75)])
    assert bytes_of(twice) == bytes_of(once)


def test_a_negative_weight_takes_away_what_the_positive_adds(params, tmp_path):
    adapter = adapter_of(params, tmp_path)
    plus, minus = (weights_of(apply_lora(params, [(adapter, w)])) for w in (1.0, -1.0))
    for name, weight in weights_of(params).items():
        np.testing.assert_allclose(plus[name] - weight, weight - minus[name], atol=3e-6)


@pytest.mark.parametrize(
    "weight", [float("nan"), float("inf"), -float("inf"), "1", True, None, 10**400, 1e39, [1.0], 1j]
)
def test_a_weight_that_is_no_finite_number_is_refused(params, tmp_path, weight):
    adapter = adapter_of(params, tmp_path)
    with pytest.raises(RequestError, match="finite number"):
        apply_lora(params, [(adapter, weight)])
    with pytest.raises(RequestError, match=r"loras\[0\].*finite number"):
        lora_merger(params)([(adapter.source, weight)])


def test_an_adapter_read_for_one_model_is_refused_by_another(params, xl_params, tmp_path):
    with pytest.raises(CheckpointError, match=r"another model.*to_k.*\(32, 64\)|which this model lacks"):
        apply_lora(xl_params, [(adapter_of(params, tmp_path, endings={"unet": ("attn2.to_k",)}), 1.0)])


def test_swapping_scaling_and_stacking_compile_nothing(params, tmp_path):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )

    @jax.jit
    def total(params):
        return sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(params))

    one, other = (adapter_of(params, tmp_path, seed=seed) for seed in (1, 2))
    seen = [float(total(params)), float(total(apply_lora(params, [(one, 1.0), (other, 1.0)])))]
    assert compiled
    compiled.clear()
    stacks = ([(other, 1.0)], [(one, 0.3)], [(one, 2), (other, np.float32(-0.7))], [(one, 1.5), (other, 0.0)], [])
    seen += [float(total(apply_lora(params, stack))) for stack in stacks]
    assert not compiled
    assert len(set(seen[1:])) == len(seen) - 1


def test_apply_lora_can_be_traced_and_differentiated(params, tmp_path):
    adapter = adapter_of(params, tmp_path)
    path, change = next(iter(adapter.changes.items()))

    def pulled(down):
        factors = change.factors._replace(product=(change.factors.product[0], down))
        swapped = {path: change._replace(factors=factors)}
        merged = apply_lora(params, [(replace(adapter, changes=swapped, digest=""), 2.0)])
        return flatten_dict(merged)[path].sum()

    up, down = change.factors.product
    gradient = jax.jit(jax.grad(pulled))(jnp.asarray(down))
    expected = np.broadcast_to(2 * up.sum(0).reshape(-1, *[1] * (down.ndim - 1)), down.shape)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)
