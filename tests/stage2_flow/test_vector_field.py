"""The network against recorded outputs of the official one, and its options."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from stage2_flow.config import VectorFieldConfig
from stage2_flow.vector_field import (
    QK_NORM_EPS,
    SelfAttention,
    TransformerBlock,
    VectorField,
    attention,
    rms_normalize,
    time_embedding,
)

KEYS = Path(__file__).parents[1] / "fixtures" / "reference"


def small_field(latent_channels: int = 4, **options) -> VectorField:
    torch.manual_seed(0)
    return VectorField(VectorFieldConfig(width=32, depth=1, mid_depth=1, heads=4, **options), latent_channels)


def inputs(batch: int = 3, channels: int = 4, height: int = 4, width: int = 4) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    frames = torch.randn(3, batch, channels, height, width, generator=generator)
    return (*frames, torch.arange(1, batch + 1), torch.rand(batch, generator=generator))


@pytest.mark.parametrize(
    ("file", "head", "channels"),
    [("vector_field_regressor_kth_ln.keys.txt", "ln", 4), ("vector_field_regressor_bair256_bn.keys.txt", "bn", 8)],
)
def test_paper_sizes_have_the_official_names_and_shapes(file, head, channels):
    with torch.device("meta"):
        field = VectorField(VectorFieldConfig(head=head), channels)
    ours = [f"{name}  {list(tensor.shape)}" for name, tensor in field.state_dict().items()]
    assert ours == (KEYS / file).read_text().splitlines()
    assert round(field.parameter_count / 1e6, 1) == 98.1


@pytest.mark.parametrize("source", ["ours", "official"])
def test_time_embedding_has_the_precision_of_fp32_angles(regressor, source):
    """cos and sin of 200 t f_i, f_i = exp(e_i), e_i = -ln(10000) i / 32, with an angle computed in fp32.

    e_i has three roundings of eps / 2, so f_i the relative error 1.5 |e_i| eps and that of exp itself, up to eps (the
    last bit of exp differs between processors); 200 t and the product round once each, cos and sin by up to eps.
    """
    t, eps = regressor["timestamps"], torch.finfo(torch.float32).eps
    exponents = -math.log(10_000) * torch.arange(32, dtype=torch.float64) / 32
    angles = 200 * t.double()[:, None] * exponents.exp()
    exact = torch.cat([angles.cos(), angles.sin()], dim=-1)
    bound = (angles * (1.5 * exponents.abs() + 1 + 1) * eps).repeat(1, 2) + eps
    code = time_embedding(t, 64) if source == "ours" else regressor["temb"]
    assert code.dtype == torch.float32
    assert ((code - exact).abs() <= bound).all()


def test_output_with_the_recorded_time_code_is_the_official_one(official_field, regressor, fp32_rounding):
    """Given the code, since fp32 angles of 200 rad differ between processors: by far more than float64 rounds."""
    names = ("input_latents", "reference_latents", "conditioning_latents", "index_distances")
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, fp32_rounding)):
        *frames, distance = (regressor[name] for name in names)
        official_field.to(dtype)
        tokens = official_field.embed(*(frame.to(dtype) for frame in frames), distance)
        output = official_field.trunk(tokens, regressor["temb"], 8, 8)
        assert (output - regressor["output_f64"]).abs().max() < tolerance


def test_output_of_the_official_training_forward(official_field, train_forward, fp32_output):
    names = ("in_input_latents", "in_reference_latents", "in_conditioning_latents", "in_index_distances", "timestamps")
    output = official_field(*(train_forward[name] for name in names))
    assert (output - train_forward["reconstructed_vectors"]).abs().max() < fp32_output


def test_autocast_leaves_times_and_distances_in_fp32():
    """bf16 has neighbors 1 apart at 200 rad, and merges distances from 256 on."""
    field, distances = small_field(), torch.tensor([1000, 1001, 1002, 1003])
    with torch.autocast("cpu", torch.bfloat16):
        codes, times = field.distance_code(distances), time_embedding(torch.tensor([0.9999, 1.0]), 64)
    assert codes.dtype == times.dtype == torch.float32
    assert torch.equal(codes, field.distance_code(distances))
    assert len(codes.unique(dim=0)) == 4


def test_compiles_without_a_graph_break():
    field, arguments = small_field(head="bn", reference=False, qk_norm=True).eval(), inputs()
    compiled = torch.compile(field, backend="eager", fullgraph=True)
    for bf16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            torch.testing.assert_close(compiled(*arguments), field(*arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 8, 65, 96), (16, 8, 65, 96), (3, 2, 17, 8)])
def test_attention_and_its_gradients_are_those_of_its_exact_form(shape, dtype):
    """softmax(q k^T / sqrt(d)) v in float64; bf16 on a CPU does not use the fused kernel."""
    generator = torch.Generator().manual_seed(0)
    *frames, gradient = (torch.randn(shape, generator=generator).to(dtype) for _ in range(4))
    results = []
    for wide in (False, True):
        query, key, value = leaves = [(x.double() if wide else x.clone()).requires_grad_() for x in frames]
        if wide:
            mixed = F.softmax(query @ key.mT / shape[-1] ** 0.5, dim=-1) @ value
        else:
            mixed = attention(query, key, value, dropout=0.0)
        results.append([mixed, *torch.autograd.grad(mixed, leaves, gradient.to(mixed.dtype))])
    # Sums of up to 96 products round like sqrt(96) eps at most, relative in the norm; bf16 rounds each result, and what
    # goes from one product to the next.
    tolerance = 96**0.5 * torch.finfo(torch.float32).eps if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for found, exact in zip(*results, strict=True):
        assert (found - exact).norm() < tolerance * exact.norm()


def test_block_is_pytorchs_encoder_layer():
    layer = nn.TransformerEncoderLayer(32, 4, 128, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    block = TransformerBlock(32, heads=4, dropout=0.0, qk_norm=False)
    block.load_state_dict(layer.state_dict(), strict=True)
    tokens = torch.randn(2, 5, 32)
    torch.testing.assert_close(block.double()(tokens.double()), layer.double()(tokens.double()), rtol=1e-12, atol=1e-12)


def test_fresh_weights_are_spread_like_pytorchs():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True).state_dict()
    for name, ours in TransformerBlock(256, heads=4, dropout=0.0, qk_norm=False).state_dict().items():
        theirs = layer[name]
        assert abs(ours.std(correction=0) - theirs.std(correction=0)) <= 0.1 * theirs.std(correction=0), name
        assert abs(ours.abs().max() - theirs.abs().max()) <= 0.02 * theirs.abs().max(), name


def test_position_code_is_the_columns_then_the_rows():
    encoding = small_field().position_encoding
    code = encoding(height=2, width=3)
    assert code.shape == (6, 32)
    # Index 5 of a map 3 wide: row 1, column 2.
    assert torch.equal(code[5], torch.cat([encoding.col_embed.weight[2], encoding.row_embed.weight[1]]))
    assert encoding.row_embed.weight.abs().max() <= 1
    assert encoding.row_embed.weight.min() < -0.9


def test_a_wide_grid_of_official_weights(official_field):
    """9x16, of 72x128 pixels: each token has the codes of its own column and row."""
    field, encoding = official_field.double(), official_field.position_encoding
    *frames, distance, t = (x.double() if x.is_floating_point() else x for x in inputs(height=9, width=16))
    tokens = field.embed(*frames, distance)
    for y, x in ((0, 0), (2, 15), (8, 3)):
        position = torch.cat([encoding.col_embed.weight[x], encoding.row_embed.weight[y]])
        projected = field.project_in["1"](torch.cat([frame[:, :, y, x] for frame in frames], dim=1))
        expected = projected + position + field.distance_code(distance)
        torch.testing.assert_close(tokens[:, 16 * y + x], expected, rtol=1e-12, atol=1e-12)
    # Behind the embedding only the last convolution knows positions, so the transposed map is that of its transposed
    # kernel.
    time = time_embedding(t, 64)
    output = field.trunk(tokens, time, 9, 16)
    torch.testing.assert_close(output, field(*frames, distance, t), rtol=1e-12, atol=1e-12)
    kernel = field.project_out["4"].weight
    kernel.data = kernel.data.mT.contiguous()
    transposed = field.trunk(rearrange(tokens, "b (h w) d -> b (w h) d", h=9), time, 16, 9)
    torch.testing.assert_close(transposed.mT, output, rtol=1e-11, atol=1e-11)


def test_batchnorm_head_equals_its_definition_with_running_statistics():
    field = small_field(head="bn").double().eval()
    arguments = [x.double() if x.is_floating_point() else x for x in inputs(height=2, width=6)]
    norm = field.project_out["3"]
    for buffer in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
        buffer.uniform_(0.5, 1.5)
    seen = {}
    field.project_out["0"].register_forward_hook(lambda module, given, output: seen.update(tokens=output))
    output = field(*arguments)
    features = nn.functional.gelu(seen["tokens"].transpose(1, 2).reshape(3, 32, 2, 6))
    scale = norm.weight / (norm.running_var + 1e-5).sqrt()
    features = (features - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(output, field.project_out["4"](features), rtol=1e-12, atol=1e-12)
    assert norm.num_batches_tracked == 0
    field.train()(*arguments)
    assert norm.num_batches_tracked == 1


def test_without_a_reference_two_frames_go_in_and_the_distance_stays():
    field = small_field(reference=False).eval()
    assert field.project_in["1"].in_features == 8
    x_t, reference, condition, distance, t = inputs()
    output = field(x_t, None, condition, distance, t)
    assert torch.equal(output, field(x_t, reference, condition, distance, t))
    assert not torch.equal(output, field(x_t, None, condition, distance + 1, t))


def test_convolutions_add_neighbors_to_the_papers_network():
    """With centers alone in the input kernels and fresh depthwise ones it is the paper's; each kernel reaches one cell.

    Time and distance do not depend on the place, so changes of neighbors outside an edge stay without effect.
    """
    plain, mixed = small_field().double().eval(), small_field(convolutions=True).double().eval()
    weights = plain.state_dict()
    kernel = torch.zeros(32, 12, 3, 3, dtype=torch.float64)
    kernel[:, :, 1, 1] = weights["project_in.1.weight"]
    missing = mixed.load_state_dict(weights | {"project_in.1.weight": kernel}, strict=False).missing_keys
    assert {name.partition(".")[0] for name in missing} == {"local_mixing"}
    arguments = [x.double() if x.is_floating_point() else x for x in inputs(height=3, width=5)]
    with torch.no_grad():
        torch.testing.assert_close(mixed(*arguments), plain(*arguments), rtol=1e-12, atol=1e-12)

        *frames, distance, t = arguments
        mixed.project_in["1"].weight.normal_()
        changed = [frames[0] + F.one_hot(torch.tensor(7), 15).view(3, 5), *frames[1:]]  # row 1, column 2
        touched = (mixed.embed(*changed, distance) - mixed.embed(*frames, distance)).abs().amax((0, 2)).view(3, 5) > 0
        assert torch.equal(touched, torch.tensor([[False, True, True, True, False]] * 3))

        time, tokens = time_embedding(t, 32), mixed.embed(*frames, distance)
        before = mixed.trunk(tokens, time, 3, 5)
        for mixer in mixed.local_mixing:
            mixer.conv.weight.normal_(), mixer.conv.bias.normal_()
            after = mixed.trunk(tokens, time, 3, 5)
            assert (after - before).abs().amax((1, 2, 3)).gt(1e-3).all()
            before = after

        mixer.conv.weight.zero_(), mixer.conv.bias.zero_()
        mixer.conv.weight[:, 0, 1, 2] = 1  # the neighbor to the right
        given = torch.randn(2, 1 + 15, 32, dtype=torch.float64)
        maps = given[:, 1:].unflatten(1, (3, 5))
        expected = maps + F.pad(maps[:, :, 1:], (0, 0, 0, 1))
        assert torch.equal(mixer(given, 3, 5), torch.cat([given[:, :1], expected.flatten(1, 2)], dim=1))


def test_every_input_matters_and_dropout_only_in_training():
    field, arguments = small_field(latent_channels=3, dropout=0.5), inputs(channels=3, height=2, width=6)
    assert not torch.equal(field(*arguments), field(*arguments))  # dropout, in training only
    output = field.eval()(*arguments)
    assert output.shape == (3, 3, 2, 6)
    assert torch.equal(field(*arguments), output)
    for index, value in enumerate(arguments):
        changed = [*arguments]
        changed[index] = value + 1 if index != 4 else value / 2
        assert not torch.allclose(field(*changed), output), index


def test_attention_drops_weights_in_bfloat16():
    one = torch.ones(64, 2, 9, 4, dtype=torch.bfloat16)
    torch.manual_seed(0)
    mixed = attention(one, one, one, dropout=0.5)
    assert (mixed.float() - 1).abs().max() > 0.1
    assert abs(mixed.float().mean() - 1) < 0.05


def test_attention_weights_are_dropped_in_training_as_in_pytorchs_layer():
    """Their mean is what evaluation computes, within standard errors of 20000 drops."""
    torch.manual_seed(0)
    attends, tokens = SelfAttention(8, heads=2, dropout=0.5, qk_norm=False).double(), torch.randn(1, 5, 8).double()
    many = tokens.expand(20_000, -1, -1)
    with torch.no_grad():
        exact, dropped = attends.eval()(tokens), attends.train()(many)
        layer = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True).double()
        layer.load_state_dict(attends.state_dict())
        theirs = layer(many, many, many, need_weights=False)[0]
    assert (dropped.mean(0) - exact).abs().max() < 6 * dropped.std(0).max() / 20_000**0.5
    torch.testing.assert_close(dropped.std(0), theirs.std(0), rtol=0.05, atol=0)
    assert dropped.std(0).min() > 0


def block_with_scales(width: int = 32, heads: int = 4) -> TransformerBlock:
    """A block with qk_norm whose learned scales and biases are no longer those of the start."""
    torch.manual_seed(0)
    block = TransformerBlock(width, heads, dropout=0.0, qk_norm=True)
    attention_ = block.self_attn
    for parameter in (attention_.q_norm.weight, attention_.k_norm.weight):
        nn.init.uniform_(parameter, 0.5, 2)
    nn.init.normal_(attention_.in_proj_bias)
    return block


def attention_by_hand(block: TransformerBlock, x: Tensor, heads: int = 4) -> Tensor:
    """softmax(q^ k^T / sqrt(d)) v head by head in float64, q^ = q / sqrt(mean(q^2) + eps) scale."""
    weights = {name: value.double() for name, value in block.self_attn.state_dict().items()}
    width = x.shape[-1]
    size = width // heads
    parts = [
        x.double() @ weights["in_proj_weight"][i * width :][:width].T + weights["in_proj_bias"][i * width :][:width]
        for i in range(3)
    ]

    def normalized(head: Tensor, scale: Tensor) -> Tensor:
        return head / (head.square().mean(-1, keepdim=True) + QK_NORM_EPS).sqrt() * scale

    mixed = []
    for head in range(heads):
        query, key, value = (part[..., head * size : (head + 1) * size] for part in parts)
        query, key = normalized(query, weights["q_norm.weight"]), normalized(key, weights["k_norm.weight"])
        mixed.append(torch.softmax(query @ key.mT / size**0.5, dim=-1) @ value)
    return torch.cat(mixed, dim=-1) @ weights["out_proj.weight"].T + weights["out_proj.bias"]


def test_normalized_attention_equals_its_definition():
    block = block_with_scales().double()
    # Small tokens: their queries are so short that eps matters.
    x = torch.randn(2, 9, 32, dtype=torch.float64) * torch.tensor([[[1.0]], [[1e-3]]], dtype=torch.float64)
    block.self_attn.in_proj_bias.data[:64] *= 1e-3
    found = block.self_attn(x)
    torch.testing.assert_close(found, attention_by_hand(block, x), atol=1e-12, rtol=1e-12)
    found.square().sum().backward()
    for norm in (block.self_attn.q_norm, block.self_attn.k_norm):
        assert norm.weight.grad.abs().max() > 0


def test_statistics_of_queries_and_keys_are_fp32_under_autocast():
    """In bf16 a mean of 4096 squares would stop growing at 256."""
    norm = nn.RMSNorm(4096, eps=QK_NORM_EPS)
    x = torch.full((4096,), 3.0, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = rms_normalize(x, norm)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, torch.ones_like(x))
    block, tokens = block_with_scales(), torch.randn(2, 9, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert block.self_attn(tokens).dtype == torch.bfloat16
    assert block.bfloat16().self_attn(tokens.bfloat16()).dtype == torch.bfloat16


def test_queries_and_keys_are_normalized_by_two_parameters_a_block_and_none_without():
    plain, normed = small_field().state_dict(), small_field(qk_norm=True).state_dict()
    added = normed.keys() - plain.keys()
    blocks = ("in_blocks.0", "mid_blocks.0", "out_blocks.0.1")
    assert added == {f"{block}.self_attn.{name}.weight" for block in blocks for name in ("q_norm", "k_norm")}
    for name, value in normed.items():
        if name in added:
            assert torch.equal(value, torch.ones(8)), name  # one scale for each feature of a head
        else:
            assert torch.equal(value, plain[name]), name  # the same start, too
    assert not [name for name in plain if "norm." in name.replace("norm1", "").replace("norm2", "")]
