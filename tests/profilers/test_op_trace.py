from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn.modules import module as nn_module
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, DynamicCache
from transformers.cache_utils import Cache

from profilers.meta import meta_compatible, meta_model
from profilers.op_trace import ROOT, OpTracer
from profilers.phases import decode_step, prefill, token_ids
from tests.tiny_models import CONFIGS, WINDOW, build

BATCH, CONTEXT = 2, 40
FLOAT = 4  # bytes

# FLOPs that torch's counter has no formula for.
OURS_ALONE = ("_grouped_mm", "grouped_mm_fallback", "linalg_solve_triangular", "dot", "mv")


def _cpu_attention(query, key, value, *args, out_shape=None, **kwargs):
    batch, heads, queries, dim = query
    return 2 * batch * heads * queries * key[-2] * (dim + value[-1])


def _reference(model, run):
    """FLOPs by torch's own counter; for the CPU's fused attention it has no formula and is lent one."""
    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention}
    with meta_compatible(), FlopCounterMode(display=False, custom_mapping=fused) as counter:
        state = run()
    prefix = type(model).__name__
    by_module = {
        name.removeprefix(prefix).removeprefix(".") or ROOT: sum(ops.values())
        for name, ops in counter.get_flop_counts().items()
        if name != "Global"
    }
    return state, counter.get_total_flops(), by_module


def _trace(model, phase, **options):
    ids = token_ids(model, BATCH, CONTEXT)
    if phase == "prefill":
        with OpTracer(model, **options) as tracer:
            prefill(model, BATCH, CONTEXT, input_ids=ids)
    else:
        state = prefill(model, BATCH, CONTEXT, input_ids=ids)
        with OpTracer(model, state.cache, **options) as tracer:
            decode_step(model, state, input_ids=ids[:, :1])
    return tracer.result()


def _count(run, *parameters, cache=None):
    """Trace a call whose weights are ``parameters``."""
    holder = torch.nn.Module()
    for index, parameter in enumerate(parameters):
        holder.register_buffer(f"weight{index}", parameter)
    with torch.inference_mode(), OpTracer(holder, cache) as tracer:
        run()
    return tracer.result()


# -- FLOPs against torch's own counter --------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("name", CONFIGS)
def test_flops_equal_torchs_counter_in_total_and_in_every_module(name, device):
    model = build(name) if device == "cpu" else meta_model(CONFIGS[name](), torch.float32)
    ids = token_ids(model, BATCH, CONTEXT)
    state, total, modules = _reference(model, lambda: prefill(model, BATCH, CONTEXT, input_ids=ids))
    _, step_total, step_modules = _reference(model, lambda: decode_step(model, state, input_ids=ids[:, :1]))
    for phase, reference, by_module in (("prefill", total, modules), ("decode", step_total, step_modules)):
        trace = _trace(model, phase)
        ours_alone = [cost.flops for group, cost in trace.ops.items() if group.name.split(" ")[0] in OURS_ALONE]
        assert trace.total.flops - sum(ours_alone) == reference
        if not any(ours_alone):
            ours = {module: cost.flops for module, cost in trace.modules.items() if cost.flops}
            assert ours == {module: flops for module, flops in by_module.items() if flops}
        assert trace.uncounted == ()


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_experts_cost_the_tokens_routed_to_them(name, device):
    model = build(name) if device == "cpu" else meta_model(CONFIGS[name](), torch.float32)
    config = model.config
    inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    tokens = BATCH * CONTEXT * config.num_experts_per_tok
    layer = tokens * 2 * config.hidden_size * inner * 3  # gate, up and down
    trace = _trace(model, "prefill")
    assert sum(c.flops for g, c in trace.ops.items() if "grouped" in g.name) == layer * config.num_hidden_layers


# -- bytes by hand ----------------------------------------------------------------------------------------------------


def test_a_linear_layer_reads_input_weight_and_bias_and_writes_its_output():
    weight, bias, x = torch.ones(7, 5), torch.ones(7), torch.ones(2, 3, 5)
    cost = _count(lambda: torch.nn.functional.linear(x, weight, bias), weight, bias).total
    assert cost.weight_bytes == (35 + 7) * FLOAT
    assert cost.activation_bytes == (30 + 42) * FLOAT
    assert cost.flops == 2 * 6 * 5 * 7


def test_an_embedding_reads_the_rows_it_needs():
    table, ids = torch.ones(1000, 8), torch.tensor([[3, 5, 3]])
    cost = _count(lambda: torch.nn.functional.embedding(ids, table), table).total
    assert cost.weight_bytes == 3 * 8 * FLOAT
    assert cost.activation_bytes == 3 * 8 + 3 * 8 * FLOAT  # int64 ids in, rows out


def test_views_are_free():
    x = torch.ones(4, 6)
    assert _count(lambda: x.t()[1:3].unsqueeze(0).expand(5, 2, 4).transpose(0, 1).detach()).total.bytes == 0


@pytest.mark.parametrize(
    ("run", "elements"),
    [
        (lambda x, y: x + y, 3 * 24),
        (lambda x, y: x * x, 2 * 24),  # the same data under two names is read once
        (lambda x, y: x * x.view(4, 6), 2 * 24),
        (lambda x, y: x.add_(y), 3 * 24),  # read, read, written
        (lambda x, y: x.copy_(y), 2 * 24),  # what it held before is not read
        (lambda x, y: x.zero_(), 24),
        (lambda x, y: torch.zeros_like(x), 24),
        (lambda x, y: torch.empty(100), 0),
        (lambda x, y: torch.cat([x, y]), 4 * 24),
        (lambda x, y: x.t().contiguous(), 2 * 24),
        (lambda x, y: x.to(torch.float64), 24 + 48),
        (lambda x, y: x.float(), 0),
        (lambda x, y: x[1:3].fill_(1.0), 12),  # a slice assignment touches the slice
        (lambda x, y: x[:, :2].copy_(y[:, :2]), 2 * 8),
        (lambda x, y: x + y[:1].expand(4, 6), 24 + 6 + 24),  # an expanded dimension is read once
        (lambda x, y: torch.add(x, y, out=torch.empty(4, 6)), 3 * 24),
        (lambda x, y: x.sum(-1), 24 + 4),
        (lambda x, y: x.index_select(0, torch.zeros(2, dtype=torch.int32)), 2 * 12 + 2 + 2),  # + zeros() itself
        (lambda x, y: x.softmax(-1), 2 * 24),
    ],
)
def test_bytes_of_small_ops(run, elements):
    x, y = torch.ones(4, 6), torch.ones(4, 6)
    assert _count(lambda: run(x, y)).total.bytes == elements * FLOAT


def test_writing_rows_touches_only_those_rows():
    table, rows, index = torch.zeros(100, 8), torch.ones(2, 8), torch.tensor([7, 9])
    given = 2 * 8 * FLOAT + 2 * 8  # values and int64 index
    assert _count(lambda: table.index_copy_(0, index, rows)).total.bytes == given + 2 * 8 * FLOAT
    assert _count(lambda: table.index_add_(0, index, rows)).total.bytes == given + 2 * 2 * 8 * FLOAT
    assert _count(lambda: table.index_put_((index,), rows)).total.bytes == given + 2 * 8 * FLOAT
    assert _count(lambda: table.index_put_((index,), rows, accumulate=True)).total.bytes == given + 2 * 2 * 8 * FLOAT


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_fused_attention_reads_each_kv_head_once_and_no_square_matrix(device):
    tokens, dim = 4096, 16
    with torch.device(device):
        query, key, value = torch.ones(1, 4, tokens, dim), torch.ones(1, 2, tokens, dim), torch.ones(1, 2, tokens, dim)
    trace = _count(
        lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    )
    assert trace.total.bytes == (4 + 2 + 2 + 4) * tokens * dim * FLOAT
    assert trace.total.flops == 2 * 2 * 4 * tokens * tokens * dim
    assert trace.total.flops_needed == 2 * 2 * 4 * (tokens * (tokens + 1) // 2) * dim
    assert [(group.op_class, cost.calls) for group, cost in trace.ops.items()] == [("attention", 1)]


def test_a_growing_cache_counts_new_entries_and_sets_its_copying_apart():
    history, new, heads, dim = 10, 3, 2, 8
    cache = DynamicCache()
    cache.update(torch.ones(1, heads, history, dim), torch.ones(1, heads, history, dim), 0)
    key, value = torch.ones(1, heads, new, dim), torch.ones(1, heads, new, dim)
    held = []
    trace = _count(lambda: held.extend(cache.update(key, value, 0)), cache=cache)
    entry = 2 * heads * dim * FLOAT  # one token, K and V
    assert trace.total.kv_bytes == new * entry
    assert trace.total.activation_bytes == new * entry
    assert trace.total.cache_copy_bytes == 2 * history * entry  # the history read and written again
    assert held[0].shape[-2] == history + new


def test_reading_what_a_cache_holds_or_returned_is_kv_traffic():
    cache = DynamicCache()
    first = torch.ones(1, 2, 10, 8)
    cache.update(first, first.clone(), 0)

    def run():
        key, value = cache.update(torch.ones(1, 2, 1, 8), torch.ones(1, 2, 1, 8), 0)
        torch.nn.functional.scaled_dot_product_attention(torch.ones(1, 2, 1, 8), key, value)
        del key, value

    trace = _count(run, cache=cache)
    entry = 2 * 2 * 8 * FLOAT
    assert trace.total.kv_bytes == entry + 11 * entry


def test_a_decode_step_of_llama_reads_its_weights_and_its_history_once():
    model = build("llama")
    config = model.config
    trace = _trace(model, "decode")
    unused_rows = (config.vocab_size - BATCH) * config.hidden_size
    weights = sum(p.numel() for p in model.parameters()) - unused_rows
    assert trace.total.weight_bytes == pytest.approx(weights * FLOAT, rel=1e-3)  # + the rotary frequencies
    entry = 2 * config.num_key_value_heads * config.head_dim * BATCH * config.num_hidden_layers * FLOAT
    assert trace.total.kv_bytes == entry * (1 + CONTEXT + 1)
    assert trace.total.cache_copy_bytes == 2 * CONTEXT * entry


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "mistral", "gpt2", "diffllama", "mamba", "jamba", "t5"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_meta_and_real_device_count_the_same(name, phase):
    real, meta = _trace(build(name), phase).total, _trace(meta_model(CONFIGS[name](), torch.float32), phase).total
    if name == "jamba":  # which experts are used depends on the values
        real.weight_bytes = meta.weight_bytes
    # A sliding-window cache moves its window length to the device the first time.
    assert real.cache_copy_bytes - meta.cache_copy_bytes <= 16 * 4
    real.cache_copy_bytes = meta.cache_copy_bytes
    if real.calls != meta.calls:  # where torch takes its unfused attention, the output needs a copy less
        assert abs(real.calls - meta.calls) <= CONFIGS[name]().get_text_config().num_hidden_layers
        assert real.activation_bytes == pytest.approx(meta.activation_bytes, rel=0.05)
        real.calls, real.activation_bytes = meta.calls, meta.activation_bytes
    assert real == meta


# -- what the mask lets through ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bool", "float", "bias", "none", "by head"])
def test_needed_flops_count_the_pairs_of_a_mask(kind):
    generator = torch.Generator().manual_seed(0)
    allowed = torch.rand(3 if kind == "by head" else 1, 1, 9, 13, generator=generator) > 0.4
    minimum = torch.finfo(torch.float32).min
    bias = torch.randn(1, 1, 9, 13, generator=generator)
    mask = {
        "bool": allowed,
        "by head": allowed,
        "float": torch.where(allowed, 0.0, -math.inf),
        "bias": torch.where(allowed, 0.0, minimum) + bias,
        "none": None,
    }[kind]
    query, key = torch.ones(3, 2, 9, 8), torch.ones(3, 2, 13, 8)
    trace = _count(lambda: torch.nn.functional.scaled_dot_product_attention(query, key, key, attn_mask=mask))
    pairs = 3 * 2 * 9 * 13 if mask is None else int(allowed.expand(3, 2, 9, 13).sum())
    assert trace.total.flops_needed == pairs * 2 * (8 + 8)
    assert trace.total.flops == 3 * 2 * 9 * 13 * 2 * (8 + 8)


def _attentions(name):
    config = CONFIGS[name]()
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager").eval()
    ids = token_ids(model, BATCH, CONTEXT)
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    with torch.inference_mode():
        output = model(**inputs, output_attentions=True)
    if model.config.is_encoder_decoder:
        return [*output.encoder_attentions, *output.decoder_attentions, *output.cross_attentions]
    return output.attentions


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize(("name", "head_dim"), [("llama", 8), ("gemma3", 8), ("mistral", 8), ("gpt2", 8), ("t5", 8)])
def test_needed_flops_match_the_weights_that_eager_attention_leaves_above_zero(name, head_dim, device):
    assert CONTEXT > WINDOW
    model = build(name) if device == "cpu" else meta_model(CONFIGS[name](), torch.float32)
    total = _trace(model, "prefill").total
    masked = sum(int((weights == 0).sum()) for weights in _attentions(name))
    assert masked > 0
    assert total.flops - total.flops_needed == masked * 2 * 2 * head_dim


@pytest.mark.parametrize("name", CONFIGS)
def test_needed_flops_on_meta_are_those_of_the_real_mask(name):
    for phase in ("prefill", "decode"):
        meta = _trace(meta_model(CONFIGS[name](), torch.float32), phase)
        assert meta.total.flops_needed == _trace(build(name), phase).total.flops_needed
        assert meta.notes == () or name == "gpt_oss"


def test_a_mask_without_values_and_of_unknown_structure_counts_as_executed_and_says_so():
    query, mask = torch.ones(1, 1, 9, 8, device="meta"), torch.ones(1, 1, 9, 9, dtype=torch.bool, device="meta")
    trace = _count(lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=mask))
    assert trace.total.flops_needed == trace.total.flops
    assert any("unknown structure" in note for note in trace.notes)


def test_eager_attention_says_that_it_counts_as_executed():
    assert any("eager" in note for note in _trace(build("gpt_oss"), "prefill").notes)


# -- experts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "jamba", "qwen3_next", "gpt_oss"])
def test_only_the_experts_really_used_are_read(name):
    model = build(name)
    chosen = []

    def remember(module, args):
        chosen.append(args[1].unique().numel())

    experts = [m for n, m in model.named_modules() if n.endswith(".experts")]
    state = prefill(model, BATCH, CONTEXT)
    handles = [module.register_forward_pre_hook(remember) for module in experts]
    with OpTracer(model, state.cache) as tracer:
        decode_step(model, state)
    for handle in handles:
        handle.remove()
    trace = tracer.result()
    assert [used for _, used in trace.experts] == [used for layer in chosen for used in (layer, layer)]
    assert {total for total, _ in trace.experts} == {4}
    for module, used in zip(experts, chosen, strict=True):
        module_name = next(n for n, m in model.named_modules() if m is module)
        matrices = sum(p.numel() for p in module.parameters() if p.dim() == 3) * FLOAT
        biases = sum(p[0].numel() for p in module.parameters() if p.dim() == 2) * BATCH * 2 * FLOAT
        assert trace.modules[module_name].weight_bytes == matrices * used // 4 + biases


def test_expected_experts_on_meta_match_the_average_over_all_routings():
    experts, per_token, tokens = 4, 2, BATCH
    subsets = list(itertools.combinations(range(experts), per_token))
    routings = list(itertools.product(subsets, repeat=tokens))
    average = sum(len(set().union(*routing)) for routing in routings) / len(routings)
    trace = _trace(meta_model(CONFIGS["mixtral"](), torch.float32), "decode")
    assert [used for _, used in trace.experts] == pytest.approx([average] * 4)


# -- books and manners ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_ops_add_up_to_the_total_and_children_to_no_more_than_their_parent(name):
    trace = _trace(build(name), "prefill", timed=True)
    for field in ("calls", "flops", "flops_needed", "weight_bytes", "activation_bytes", "kv_bytes", "cache_copy_bytes"):
        assert sum(getattr(cost, field) for cost in trace.ops.values()) == getattr(trace.total, field)
        children = {}
        for module, cost in trace.modules.items():
            parent = module.rpartition(".")[0]
            if module != ROOT and parent in trace.modules:
                children[parent] = children.get(parent, 0) + getattr(cost, field)
        assert all(total <= getattr(trace.modules[parent], field) for parent, total in children.items())
    assert trace.total.bytes == sum(group.bytes * cost.calls for group, cost in trace.ops.items())
    timed = {group for group, _ in trace.timeline}
    assert timed == set(trace.ops)
    assert len(trace.timeline) == trace.total.calls
    assert all(seconds >= 0 for _, seconds in trace.timeline)


def test_nothing_is_timed_on_meta():
    assert _trace(meta_model(CONFIGS["llama"](), torch.float32), "prefill", timed=True).timeline == ()


@pytest.mark.parametrize("fails", [False, True])
def test_tracing_leaves_model_and_library_as_they_were(fails):
    model = build("llama")
    ids = token_ids(model, BATCH, CONTEXT)
    before = prefill(model, BATCH, CONTEXT, input_ids=ids)
    methods = {name: vars(Cache)[name] for name in ("update", "update_conv_state", "update_recurrent_state")}
    hooks = [*nn_module._global_forward_hooks, *nn_module._global_forward_pre_hooks]
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    try:
        with OpTracer(model, timed=True):
            during = prefill(model, BATCH, CONTEXT, input_ids=ids)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert torch.equal(during.logits, before.logits)
    assert torch.equal(prefill(model, BATCH, CONTEXT, input_ids=ids).logits, before.logits)
    assert {name: vars(Cache)[name] for name in methods} == methods
    assert [*nn_module._global_forward_hooks, *nn_module._global_forward_pre_hooks] == hooks
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_op_without_a_formula_is_named():
    @torch.library.custom_op("effcli_tests::mystery", mutates_args=())
    def mystery(x: torch.Tensor) -> torch.Tensor:
        return x @ x

    x = torch.ones(4, 4)
    trace = _count(lambda: torch.ops.effcli_tests.mystery(x))
    assert trace.uncounted == ("mystery",)
    assert trace.total.flops == 0
    assert trace.total.bytes == 2 * 16 * FLOAT


def test_a_cache_of_unknown_kind_is_named():
    class Strange:
        state = torch.ones(3)

    assert any("Strange" in note for note in _count(lambda: None, cache=Strange()).notes)


def test_names_have_shapes_and_classes():
    trace = _trace(build("mamba"), "prefill")
    classes = {group.op_class for group in trace.ops}
    assert {"matmul", "convolution", "elementwise", "embedding", "cache", "copy", "reduction"} <= classes
    assert "other" not in classes
    assert trace.recurrent
    assert any(group.name.startswith("linear [2x40x32, 128x32]") for group in trace.ops)
