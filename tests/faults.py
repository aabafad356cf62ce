"""Deliberate faults: each is put into a copy of the library, and the named tests must fail.

    python tests/faults.py [-k NAME] [--quarter 0..3]

Exit status 0 when every fault was caught. A fault whose old text is not in its file exactly once, a selection of
tests that does not pass without a fault, and a fault that breaks the collection of the tests are errors as well:
such a fault proves nothing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch  # noqa: F401  imported once, for all forks

ROOT = Path(__file__).resolve().parent.parent
FORK = multiprocessing.get_context("fork")
WORKERS = 2


@dataclass(frozen=True)
class Fault:
    name: str
    module: str
    old: str
    new: str
    test: str  # file tests/test_....py
    expression: str  # its -k


ANY_SPLIT = ("vocab_parallel", "any_split")
FORMULA = ("vocab_parallel", "every_objective_is_its_formula")
MASKED = ("vocab_parallel", "masked_token_contributes")
POISON = ("vocab_parallel", "poisons_its_token_alone")
LIMITS = ("objectives", "impossible_certain_and_broken")
TP_FORMULA = ("tensor_parallel", "whole_vocabulary and 2-dft")
WHOLE_COLLECTIVES = ("tensor_parallel", "gathers_once and 2")
SCHEDULE = ("objectives", "schedule_goes")
CP_RUN = ("layouts", "agree_with_one_rank and CP and not x")
TRITON_FORMULA = ("triton", "every_objective_is_its_formula")
TRITON_SPLIT = ("triton", "any_split")
TRITON_TWIN = ("triton", "that_of_the_torch_backend")
TRITON_WIDTH = ("triton", "any_width and not statistics")
HIDDEN = ("linear", "through_all_the_logits")
MAIN_GRAD = ("loss_head", "megatron_accumulates_them")
METRIC = ("metrics", "weighted_sum")
DETAIL = ("metrics", "details_are")
TEMPLATES = ("chat", "nothing_else")

# fmt: off
FAULTS = [
    # The parts of a split vocabulary
    Fault("no max exchange", "stats", 'part["maximum"] - maximum', '0.0 * part["maximum"]', *ANY_SPLIT),
    Fault("rebase on shard 0", "stats", 'part["maximum"].amax(0)', 'part["maximum"][0]', *ANY_SPLIT),
    Fault("no sum over shards", "stats", '(part["sum"] * scale).sum(0)', '(part["sum"] * scale)[0]', *ANY_SPLIT),
    Fault("target of shard 0", "stats", 'part["target_logit"].sum(0)', 'part["target_logit"][0]', *ANY_SPLIT),
    Fault("entropy not shifted", "stats", ' + shift * part["sum"]', "", *ANY_SPLIT),
    Fault("entropy shifted twice", "stats", "+ shift * part", "+ 2.0 * shift * part", *ANY_SPLIT),
    Fault("collision scaled once", "stats", "scale.square()", "scale", *ANY_SPLIT),
    Fault("-inf shard as NaN", "stats", 'part["maximum"].isneginf()', 'part["maximum"].isnan()', *ANY_SPLIT),
    Fault("-inf shard not cleared", "reference", "maximum.isneginf(), 0.0", "maximum.isnan(), 0.0", *ANY_SPLIT),
    Fault("padding keeps its bytes", "reference", "out[:, shard.columns :] = 0.0", "pass", *ANY_SPLIT),
    Fault("every shard owns column 0", "reference", "(-coefficient[rows] * owned)", "(-coefficient[rows])", *ANY_SPLIT),
    Fault("no shard offset", "reference", "target - shard.start", "target", *ANY_SPLIT),
    # Real ranks
    Fault("no gather", "autograd", "group is None or group.size() == 1", "True", *TP_FORMULA),
    Fault("offset of rank 0", "autograd", "VocabShard(rank * width", "VocabShard(0 * width", *TP_FORMULA),
    Fault("rank of the world", "autograd", "self.tp_group.rank()", "torch.distributed.get_rank()",
          "tensor_parallel", "group_within_the_world"),
    Fault("vocabulary of one shard", "autograd", "part[None], target, shard.vocab_size,",
          "part[None], target, logits.shape[-1],",
          "tensor_parallel", "whole_vocabulary and 2-entropy"),
    Fault("second collective", "autograd", "    gathered = rows.new_empty",
          "    torch.distributed.all_reduce(rows.clone(), group=group)\n    gathered = rows.new_empty",
          *WHOLE_COLLECTIVES),
    Fault("sends what nobody needs", "autograd", "return self.objective.needs | self.statistics",
          'return frozenset({"entropy", "collision"})', *WHOLE_COLLECTIVES),
    # Gate and gradient
    Fault("gate differentiated", "objectives", "gate * stats.nll), gate",
          "gate * stats.nll), gate * (1 + stats.logprob)", "objectives", "pushes_rare_targets_up"),
    Fault("no one-hot", "reference", "-coefficient[rows] * owned", "0.0 * coefficient[rows] * owned", *FORMULA),
    Fault("row 0's gate", "reference", "return (upstream * gate)", "return (upstream * gate.flatten()[0])",
          *FORMULA),
    Fault("mean upstream", "reference", "return (upstream *", "return (upstream.mean() *", *FORMULA),
    Fault("rounded twice", "reference", "        column, owned = _local_column(target[rows]",
          "        x.copy_(x.to(out.dtype))\n        column, owned = _local_column(target[rows]",
          "vocab_parallel", "rounded_once"),
    Fault("weight in the dtype of the logits", "reference",
          "torch.float64 if logits.dtype == torch.float64 else torch.float32", "logits.dtype",
          "vocab_parallel", "at_most_twice"),
    Fault("max and log-sum as one", "reference", "[merged.maximum, merged.log_sum, gate]",
          "[0.0 * merged.maximum, merged.log_sum + merged.maximum, gate]", "vocab_parallel", "same_bits"),
    Fault("gate 1 under value=nll", "reference", "merged.log_sum, gate]",
          'merged.log_sum, gate if value == "objective" else gate * 0 + 1]', "vocab_parallel", "value_nll"),
    Fault("value ignored", "reference", '(-stats.logprob if value == "nll" else loss.clone())', "loss.clone()",
          "vocab_parallel", "value_nll"),
    Fault("chunk read twice", "reference", "rows = index[first:last]", "rows = index[: last - first]",
          "vocab_parallel", "chunks"),
    # Masks, padding and broken numbers
    Fault("loss not masked", "objectives", "return loss.masked_fill(~stats.valid, 0.0), ", "return loss, ", *MASKED),
    Fault("gradient not masked", "objectives", ", gate.masked_fill(~stats.valid, 0.0)", ", gate", *MASKED),
    Fault("0 x NaN", "reference",
          "return (upstream * gate).masked_fill((upstream == 0.0) | (gate == 0.0), 0.0)",
          "return upstream * gate", *MASKED),
    Fault("statistics not masked", "stats", "entropy.masked_fill(~valid, 0.0)", "entropy",
          "vocab_parallel", "vocab_stats"),
    Fault("dead rows keep their bytes", "reference", "out.index_fill_(0, (~live).nonzero().squeeze(1), 0.0)", "pass",
          "vocab_parallel", "trains_on"),
    Fault("ignore_index fixed", "reference", "token_stats(merged, target != ignore_index,",
          "token_stats(merged, target != -100,",
          "vocab_parallel", "ignore_index_may_be_a_token"),
    Fault("true_vocab_size ignored", "autograd", "if self.true_vocab_size is None else self.true_vocab_size", "",
          *FORMULA),
    Fault("poisoned loss, finite gradient", "objectives", "gate.masked_fill(stats.logprob.isnan(), torch.nan)",
          "gate", *POISON),
    Fault("poison removed", "reference", "masked_fill(outside, torch.nan)", "masked_fill(outside, 0.0)", *POISON),
    Fault("unknown ids accepted", "autograd", "| (target >= vocab_size)", "", "vocab_parallel", "who_look_for_it"),
    Fault("ignored ids refused", "autograd", "(target != ignore_index) & ((target", "((target", "vocab_parallel",
          "who_look_for_it"),
    Fault("-inf x 0", "reference", "torch.clamp(x, min=UNDERFLOW, out=spare[: len(x)])",
          "spare[: len(x)].copy_(x)", "vocab_parallel", "impossible_words"),
    Fault("clamp removed", "stats", "(distance - merged.log_sum).clamp(max=0.0)", "(distance - merged.log_sum)",
          "objectives", "rounding_never"),
    Fault("first choice not shared", "stats", "distance >= 0.0", "distance > 0.0", "vocab_parallel", "may_be_shared"),
    # The memory of others
    Fault("forward writes", "reference", "scratch[: last - first].copy_(logits[first:last, :columns])",
          "logits[first:last, :columns].to(scratch.dtype)",
          "vocab_parallel", "never_writes"),
    Fault("no version guard", "autograd", "rows = logits.reshape", "rows = logits.data.reshape",
          "vocab_parallel", "overwritten_logits"),
    Fault("leaf overwritten", "autograd", "if options.inplace_backward and", "if False and",
          "vocab_parallel", "leaf_is_never"),
    Fault("never in place", "autograd", "rows if inplace else torch.empty_like(rows)",
          "torch.empty_like(rows)", "vocab_parallel", "writes_over"),
    Fault("loss is a view", "reference", 'return (-stats.logprob if value == "nll" else loss.clone())',
          'return torch.stack([-stats.logprob if value == "nll" else loss] * 2)[0]', "vocab_parallel",
          "owns_its_memory"),
    Fault("fp32 copy of all logits", "autograd", "    part = kernels.shard_stats",
          "    logits = logits.to(reference.accumulation_dtype(logits), copy=True)\n    part = kernels.shard_stats",
          "performance", "memory and float32"),
    # The Triton kernels
    Fault("masked row read", "triton_kernels", "    if target == ignore_index:", "    if target == ignore_index - 1:",
          "triton", "not_read and masked"),
    Fault("worthless row read", "triton_kernels", "    if coefficient == 0.0:", "    if coefficient == 1e30:",
          "triton", "not_read and worthless"),
    Fault("row offset in int32", "triton_kernels", "row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)",
          "triton", "two_to_the_31"),
    Fault("row offset in int32, backward", "triton_kernels", "(program // tiles).to(tl.int64)", "program // tiles",
          "triton", "two_to_the_31"),
    Fault("edge forgotten", "triton_kernels", "X + begin + column, is_edge, -INF",
          "X + begin + column, column < 0, -INF", *TRITON_WIDTH),
    Fault("edge of the gradient forgotten", "triton_kernels", "(vectors * VEC < width):", "(width < 0):",
          *TRITON_WIDTH),
    Fault("edge counted twice", "triton_kernels", "tl.where(index < head, index, index + body)", "index",
          *TRITON_WIDTH),
    Fault("tail of a tile read twice", "triton_kernels", "vector * VEC + word, vector < vectors, -INF",
          "vector * VEC + word, lane < vectors, -INF", *TRITON_WIDTH),
    Fault("padding read", "triton_kernels", "first, vectors = _body(begin, columns, VEC)",
          "first, vectors = _body(begin, columns + VEC - 1, VEC)", "triton", "padding"),
    Fault("padding given a gradient", "triton_kernels", "tl.where(column < end, error, 0.0)", "error",
          "triton", "padding"),
    Fault("lane not rebased", "triton_kernels", "s * scale + tl.sum(e, 1), a, q", "s + tl.sum(e, 1), a, q",
          *TRITON_WIDTH),
    Fault("lanes not merged", "triton_kernels", "tl.sum(s * scale, 0)", "tl.sum(s, 0)", *TRITON_WIDTH),
    Fault("entropy of lanes not shifted", "triton_kernels", "tl.sum((a + shift * s) * scale, 0)",
          "tl.sum(a * scale, 0)", "triton", "more_statistics"),
    Fault("entropy of a lane not shifted", "triton_kernels", "(a + shift * s) * scale + tl.sum(distance * e, 1)",
          "a * scale + tl.sum(distance * e, 1)", "triton", "more_statistics"),
    Fault("collision of lanes scaled once", "triton_kernels", "q * (scale * scale) + tl.sum(e * e, 1)",
          "q * scale + tl.sum(e * e, 1)", "triton", "more_statistics"),
    Fault("ranks not rebased", "triton_kernels", "s += part_s * scale", "s += part_s", *TRITON_SPLIT),
    Fault("entropy of ranks not shifted", "triton_kernels", "0.0) + shift * part_s) * scale", "0.0)) * scale",
          *TRITON_SPLIT),
    Fault("-inf rank as NaN", "triton_kernels", "return tl.where(m == -INF, 0.0, m - larger)", "return m - larger",
          *TRITON_SPLIT),
    Fault("no shard offset in Triton", "triton_kernels", "tl.load(TARGET + row) - start", "tl.load(TARGET + row)",
          *TRITON_SPLIT),
    Fault("target of every rank", "triton_kernels", "owned = (target >= start) & (target < start + columns)",
          "owned = target >= start", *TRITON_SPLIT),
    Fault("no one-hot in Triton", "triton_kernels", "tl.where(column == target, softmax - coefficient, softmax)",
          "softmax", *TRITON_FORMULA),
    Fault("stride of upstream", "triton_kernels", "UPSTREAM + row * upstream_stride", "UPSTREAM + row",
          "triton", "any_stride"),
    Fault("stride of targets", "autograd", "target = target.contiguous().view(-1)", "target = target.reshape(-1)",
          "triton", "any_stride"),
    Fault("maximum and log-sum as one, Triton", "triton_kernels",
          "tl.exp2((x - maximum) * LOG2_E) * (coefficient * tl.exp(-log_sum))",
          "tl.exp2((x - (maximum + log_sum)) * LOG2_E) * coefficient", "triton", "same_bits"),
    Fault("0 x NaN in Triton", "triton_kernels", "tl.where((upstream == 0.0) | (gate == 0.0), 0.0, upstream * gate)",
          "upstream * gate", "triton", "masked_token_contributes"),
    Fault("poison removed in Triton", "triton_kernels", 'tl.where(outside, float("nan"), logit)', "logit",
          "triton", "poisons_its_token_alone"),
    Fault("finite gradient beside a NaN loss", "triton_kernels", "tl.where(logprob != logprob, logprob, gate)", "gate",
          "triton", "poisons_its_token_alone"),
    Fault("-inf x 0 in Triton", "triton_kernels", "return tl.maximum(distance, UNDERFLOW)", "return distance",
          "triton", "impossible"),
    Fault("value ignored in Triton", "triton_kernels", "-logprob if NLL else loss", "loss", *TRITON_TWIN),
    Fault("blend forgotten", "triton_kernels", "        if SCHEDULED:", "        if False:", *TRITON_TWIN),
    Fault("blend of the loss alone, Triton", "triton_kernels", "gate = (1.0 - blend) + _share(blend, gate)",
          "gate = gate", *TRITON_TWIN),
    Fault("digits lost in Triton", "triton_kernels", "tl.where(x > -0.7, x * series, tl.exp(x) - 1.0)",
          "tl.exp(x) - 1.0", "triton", "small_exponents"),
    Fault("parameters swapped", "triton_kernels", '("mix", o.alpha, 1.0 - o.alpha)', '("mix", 1.0 - o.alpha, o.alpha)',
          *TRITON_FORMULA),
    Fault("a subclass's formula lost", "triton_kernels", "FORMS.get(type(then), lambda",
          "FORMS.get(DFT if isinstance(then, DFT) else type(then), lambda", "triton", "users_own"),
    Fault("no version guard in Triton", "triton_kernels", "torch.autograd.graph.increment_version(out)", "pass",
          "triton", "overwritten_logits"),
    Fault("waits for the device", "triton_kernels", "    shape, n = target.shape, target.numel()\n",
          "    shape, n = target.shape, target.numel()\n    bool((target == ignore_index).all())\n",
          "triton", "three_kernels"),
    Fault("a chain of small operations", "autograd", "    ctx.set_materialize_grads(False)", "    pass",
          "triton", "three_kernels"),
    Fault("two-byte loads", "triton_kernels", "vector * VEC + word, vector < vectors, -INF",
          "vector * VEC + word, vector * VEC + word < columns, -INF", "triton_compiled", "read_16_bytes"),
    Fault("two-byte stores", "triton_kernels", "_write_error(X, OUT, column, vector < vectors,",
          "_write_error(X, OUT, column, column < width,", "triton_compiled", "written_16_bytes"),
    Fault("two exponentials for each logit", "triton_kernels", "larger = tl.maximum(m, tl.max(x, 1))",
          "larger = tl.maximum(m, tl.max(x, 1)) + 0.0 * tl.sum(tl.exp2(x), 1)",
          "triton_compiled", "is_read_16_bytes"),
    Fault("another objective in the graph", "compiled", "_OBJECTS.get(objective, objective)", '"dft"',
          "compile", "same_bits"),
    Fault("one name for all objects", "compiled", 'f"{thing} #{len(_OBJECTS)}"', '"object"',
          "compile", "options_are_those"),
    # Objectives
    Fault("0 x inf", "objectives", "torch.where(gate == 0.0, 0.0, gate * stats.nll)", "gate * stats.nll", *LIMITS),
    Fault("digits lost near 1", "objectives", "-torch.expm1(a * stats.logprob) / a",
          "(1 - torch.exp(a * stats.logprob)) / a", "objectives", "tends_to_nll"),
    Fault("cayley over all tokens", "objectives", "stats.valid & p.isfinite()", "p.isfinite()", *FORMULA),
    Fault("cayley poisoned", "objectives", "stats.valid & p.isfinite()", "stats.valid", *POISON),
    Fault("threshold hides NaN", "objectives", "(stats.prob < self.lo) | (stats.prob > self.hi)",
          "~((stats.prob >= self.lo) & (stats.prob <= self.hi))", *LIMITS),
    Fault("threshold keeps the gate", "objectives", "gate.masked_fill(outside, 0.0)", "gate", *FORMULA),
    Fault("dft without its weight", "objectives", "return stats.prob\n", "return torch.ones_like(stats.prob)\n",
          "objectives", "peaks_at"),
    Fault("blend the wrong way round", "objectives", "_share(1.0 - blend, stats.nll) + _share(blend, loss)",
          "_share(blend, stats.nll) + _share(1.0 - blend, loss)", *SCHEDULE),
    Fault("blend of the loss alone", "objectives", "(1.0 - blend) + _share(blend, gate)", "gate", *SCHEDULE),
    Fault("ramp one iteration late", "objectives", "(iteration - self.start)", "(iteration - 1 - self.start)",
          *SCHEDULE),
    Fault("0 x inf in a blend", "objectives", "torch.where(part == 0.0, 0.0, part * x)", "part * x",
          "objectives", "ends_of_a_schedule"),
    Fault("blend fixed in a captured graph", "objectives",
          "        for copy in self._blend.values():\n            copy.fill_(blend)",
          "        self._blend[CPU] = torch.tensor(blend, dtype=torch.float64)", "objectives", "captured_graph"),
    # Inside a host
    Fault("batch and sequence swapped in the host", "hosts/loss_head", "return labels.transpose(0, 1).contiguous()",
          "return labels.reshape(labels.shape[::-1])", "hook", "hosts_own_gradient"),
    Fault("statistics of other tokens", "hosts/loss_head", "x.reshape(self.shape).transpose(0, 1).reshape(-1)",
          "x.reshape(-1)", "hook", "adds_up"),
    Fault("tensor-parallel group forgotten", "hosts/loss_head", "config.options(compat.tp_group(model))",
          "config.options()", "hook", "hosts_own_gradient"),
    Fault("heads take the objective", "hosts/loss_head", "            if labels is not self.inputs.labels:",
          "            if False:", "hook", "multi_token"),
    Fault("report without the loss mask", "hosts/hook", "weights = micro_batch.pick(mask)",
          "weights = micro_batch.pick(torch.ones_like(mask))", "hook", "contributes_nothing"),
    Fault("inf of a masked token", "hosts/hook",
          "losses = losses.masked_fill(mask.reshape(losses.shape) == 0.0, 0.0)", "pass", "hook", "contributes_nothing"),
    Fault("wrong gradient let through", "hosts/compat", "cp > 1 and", "cp > 2 and", "hook", "fight_with"),
    Fault("contiguous slices", "hosts/cpu_attention", "torch.minimum(chunk, chunks - 1 - chunk) == cp_rank",
          "chunk // 2 == cp_rank", "cpu_host", "front_and_a_back"),
    Fault("documents see each other", "hosts/cpu_attention",
          "(query_document[:, None] == key_document) & ", "", "cpu_host", "its_formula"),
    # From the hidden states on
    Fault("chunks without offset", "stats", "self.start + columns.start", "self.start", *HIDDEN),
    Fault("padding within a chunk", "stats", "min(max(self.columns - columns.start, 0), columns.stop - columns.start)",
          "columns.stop - columns.start", *HIDDEN),
    Fault("hidden gradient of the last chunk", "linear", "self.total.add_(part)", "self.total.copy_(part)", *HIDDEN),
    Fault("hidden gradient of one rank", "linear", "self.tp_group is not None and self.tp_group.size() > 1", "False",
          *HIDDEN),
    Fault("hidden gradient summed in bf16", "linear", "dtype=reference.accumulation_dtype(hidden)",
          "dtype=hidden.dtype", "linear", "in_fp32"),
    Fault("kept for nothing", "linear", "if any(ctx.needs_input_grad) else 0", "", "linear", "nothing_is_kept"),
    Fault("kept and computed again", "linear", "logits = kept[i] if i < len(kept) else _logits(hidden,",
          "logits = _logits(hidden,", "linear", "not_computed_again"),
    Fault("product for a frozen weight", "linear", "into(weight) if ctx.needs_input_grad[1] else None", "into(weight)",
          "linear", "costs_no_product"),
    Fault("masked tokens of another index", "compaction", "(target != ignore_index).nonzero()",
          "(target != -100).nonzero()", "linear", "do_not_pass"),
    Fault("losses in another order", "compaction", "loss.new_zeros(len(target)).index_copy(0, rows, loss)",
          "torch.cat([loss, loss.new_zeros(len(target) - len(rows))])", *HIDDEN),
    Fault("gradient of no row", "compaction", ".index_copy_(0, rows, gradient)", "", *HIDDEN),
    Fault("nobody there", "compaction", "rows if len(rows) else rows.new_zeros(min(1, len(target)))", "rows",
          "linear", "nothing or no_token_to_learn"),
    Fault("the part of the first rank", "compaction", "slice(tp_group.rank() * len(hidden), (tp_group.rank() + 1) *",
          "slice(0, 1 *", *HIDDEN),
    Fault("loss mask forgotten", "hosts/loss_head", "if mask is not None:", "if False:", "hook", "0_where_masked"),
    Fault("gradient of one rank's vocabulary", "hosts/loss_head", "allreduce_dgrad=True", "allreduce_dgrad=False",
          "loss_head", "accumulated"),
    Fault("no way back from a failure", "hosts/loss_head", 'vars(self.model.output_layer).pop("forward", None)', "pass",
          "loss_head", "without_labels"),
    Fault("hooks of the layer skipped", "hosts/loss_head", "in list(layer._forward_pre_hooks.items()):",
          "in []:", "loss_head", "hooks_that_bring"),
    Fault("main_grad of the first chunk", "hosts/loss_head", "self.weight.main_grad[columns]",
          "self.weight.main_grad[: gradient.shape[1]]", *MAIN_GRAD),
    Fault("gradient reduced twice", "hosts/loss_head", "self.weight.grad_added_to_main_grad = True", "pass",
          *MAIN_GRAD),
    Fault("garbage for tied embeddings", "hosts/loss_head", "make = torch.zeros_like if", "make = torch.ones_like if",
          *MAIN_GRAD),
    Fault("plain logits without a word", "hosts/compat", "if config.compact_masked_tokens and obstacle:", "if False:",
          "loss_head", "left_out_by_default"),
    Fault("chunks of a quantized weight", "hosts/compat", "weight.element_size() < 2", "False", "loss_head",
          "chunks_are_refused and fp8"),
    # A whole run: layouts, iterations, checkpoints
    Fault("hook lost on one virtual stage", "hosts/hook", "for chunk in model_chunks:",
          "for chunk in model_chunks[:1]:", "layouts", "agree_with_one_rank and interleaved and not DP"),
    Fault("mean of means", "metrics", "[sums, weight.sum().expand_as(sums)]",
          "[sums / weight.sum().clamp(min=1.0), torch.ones_like(sums)]", *CP_RUN),
    Fault("context parallelism forgotten", "hosts/iterations",
          "get_data_parallel_world_size(with_context_parallel=True)", "get_data_parallel_world_size()", "layouts",
          "agree_with_one_rank and CP and not x and not hybrid"),
    Fault("micro-batches of one rank", "hosts/iterations", "get_num_microbatches() * ", "get_num_microbatches() * 0 + ",
          "launch", "need_no_collective"),
    Fault("validation as the host averages", "hosts/iterations",
          " | {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}",
          "", "launch",
          "mean_over_tokens"),
    Fault("tokens never forgotten", "metrics", "self._sums.zero_()", "pass", "launch", "mean_over_tokens"),
    # Histograms and channels
    Fault("error of a token without its target", "stats", "1.0 - 2.0 * self.prob + self.collision",
          "self.collision", *DETAIL),
    Fault("gradient without the gate", "metrics", "stats.gate * stats.error", "stats.error", *DETAIL),
    Fault("tokens for gradient", "metrics", "torch.cat([one, gradient])", "torch.cat([gradient, one])", *DETAIL),
    Fault("certain token beyond the bins", "metrics", "clamp(0, BINS - 1)", "remainder(BINS)",
          "metrics", "probability_of_one"),
    Fault("means for totals", "metrics", "name: total if is_total(name) else total / count\n",
          "name: total / max(count, 1)\n", "metrics", "details_are"),
    Fault("channel without a name is the last", "metrics", "number >= channels, 0)",
          "number >= channels, channels - 1)", *DETAIL),
    Fault("missing channel is NaN", "metrics", "            if count or is_total(name)\n", "", "metrics",
          "channels_may_be_missing"),
    Fault("masked token in a histogram", "metrics",
          "torch.where(weight > 0.0, columns.flatten(1).double() * weight, 0.0)",
          "columns.flatten(1).double() * weight", "metrics", "spoils_no_other"),
    Fault("channel on ignored labels", "channels", "torch.where(labels < 0, labels, marked)", "marked",
          "channels", "come_back"),
    Fault("channel left on labels", "channels", "torch.where(carries, labels & ((1 << SHIFT) - 1), labels)", "labels",
          "channels", "come_back"),
    Fault("channel of the token before", "hosts/sft", "torch.arange(1, len(sample[\"labels\"]) + 1",
          "torch.arange(0, len(sample[\"labels\"])", "sft", "boundary"),
    Fault("channels in another order", "hosts/hook", "None if channel is None else micro_batch.pick(channel)",
          "None if channel is None else micro_batch.pick(channel).flip(0)", "hook", "details_and"),
    Fault("missing channel forgotten", "hosts/iterations", "self._known[name] = losses[name]", "pass", "hook",
          "details_and"),
    Fault("callback in another order", "hosts/loss_head", "x.view(self.shape[::-1]).transpose(0, 1)",
          "x.view(self.shape)", "hook", "details_and"),
    Fault("callback without the dropped tokens' places", "hosts/loss_head", "index_copy(0, self.rows, x)",
          "index_copy(0, torch.arange(len(x)), x)", "hook", "details_and"),
    # What a user sees of the data before training
    Fault("prompt trains", "chat", "spans.append((len(prompt), turn))", "spans.append((0, turn))", *TEMPLATES),
    Fault("reply without its closing token", "chat", "if closing and text.startswith(closing, behind, end):",
          "if False:", *TEMPLATES),
    Fault("reply of a later turn", "chat", "following = len(prompt)", "pass", "chat", "closes_the_last"),
    Fault("last token of a reply left out", "chat", "spans.append((first, last + 1))", "spans.append((first, last))",
          *TEMPLATES),
    Fault("end of the text does not train", "chat", "spans[-1] = (spans[-1][0], len(text))", "pass",
          "chat", "end_of_the_text"),
    Fault("padding that is a target", "chat", "trained = {t.eos_token_id, *encoded.targets()}", "trained = set()",
          "chat", "never_a_target"),
    Fault("empty system message shown", "chat", 'm["role"] != "system" or m["content"]', "True",
          "chat", "empty_system"),
    Fault("cut by the tokenizer", "chat", "tokenizer.backend_tokenizer.no_truncation()", "pass",
          "chat", "cuts_and_pads"),
    Fault("room not given back", "packing", "with_room[room - size].append(line)", "with_room[room].append(line)",
          "packing", "is_best_fit"),
    Fault("worst fit", "packing", "(enough & -enough).bit_length() - 1", "enough.bit_length() - 1",
          "packing", "is_best_fit"),
    Fault("line that is too full", "packing", "if room >= size", "if room + 1 >= size", "packing", "first_fit_takes"),
    Fault("padding of conversations forgotten", "data", "multiple = 2 * cp if cp > 1 else 1\n", "multiple = 1\n",
          "data", "no_line_is_longer"),
    Fault("rejected line takes another's result", "data", "None if reason else next(results)", "next(results, None)",
          "data", "comes_out_once"),
    Fault("offset of the line before", "data", "line = Line(file, number, offset)", "line = Line(file, number, 0)",
          "data", "comes_out_once"),
    Fault("list of rejected lines stays", "data", "rejected.unlink(missing_ok=True)", "pass", "data", "does_not_stay"),
    Fault("replies beyond a line counted", "data", "max(min(last, seq_length) - first, 0)", "last - first",
          "data", "nothing_is_left"),
    Fault("survey of masked tokens", "survey", "torch.where(batch.stats.valid, batch.loss_mask.double(), 0.0)",
          "batch.loss_mask.double().fill_(1.0)", "survey", "counted_by_channel"),
    Fault("survey without the error's length", "survey", "loss, gate, gate * stats.error)", "loss, gate, gate)",
          "survey", "formula_says"),
    Fault("advice upside down", "survey", "if mean > STRONG:", "if mean < STRONG:", "survey", "follows_mean_p"),
    Fault("channels that nobody names", "hosts/sft", "if name != OTHER and name not in found:", "if False:", "sft",
          "no_line_names"),
    Fault("tokens lost in a checkpoint", "hosts/iterations", "getattr(checkpoint_args, TOTAL, 0)", "0",
          "checkpoints", "another_objective and nll-dft"),
    Fault("schedule late", "hosts/iterations", "self.objective.begin(run.curr_iteration + 1)",
          "self.objective.begin(run.curr_iteration)", "checkpoints", "then_a_blend"),
    Fault("schedule starts again in evaluation", "hosts/iterations", 'getattr(get_args(), "iteration", 0)', "1",
          "checkpoints", "evaluation_alone"),
    Fault("report of another schedule", "config", "    @cached_property\n    def objective",
          "    @property\n    def objective", "config", "share_one"),
    Fault("training loop left changed", "hosts/patches", "                setattr(owner, name, original)",
          "                pass", "patches", "as_it_was"),
    # What a user sees
    Fault("batch and sequence swapped", "autograd", "if target.shape != rows.shape[:-1]:",
          "if target.numel() * rows.shape[-1] != rows.numel():", "vocab_parallel", "does_not_fit"),
    Fault("metric without mask", "metrics", "loss_mask.float() * stats.valid", "stats.valid.float()", *METRIC),
    Fault("metric of ignored tokens", "metrics", "loss_mask.float() * stats.valid", "loss_mask.float()", *METRIC),
    Fault("metric 0 x NaN", "metrics", "torch.where(weight > 0.0, torch.stack(list(columns.values())) * weight, 0.0)",
          "(torch.stack(list(columns.values())) * weight)",
          "metrics", "whatever_it_is"),
    Fault("count of all tokens", "metrics", "weight.sum().expand", "torch.ones_like(weight).sum().expand", *METRIC),
    Fault("host reports the objective", "config", 'value="nll"', 'value="objective"', "config", "host_reports"),
    Fault("setting not passed on", "config", "backend=self.backend,", "", "config", "host_reports"),
    Fault("unknown key accepted", "config", "if key not in known:", "if False:", "config", "settings_are_refused"),
    Fault("import upwards", "metrics", "    weight = loss_mask",
          "    import megatron_dft.config\n\n    weight = loss_mask", "layout", "point_down"),
    # Megatron-Bridge, as far as it takes none: test_bridge_host has the rest
    Fault("mask of another output", "hosts/hook", "                mask = others[0]\n",
          "                mask = compat.loss_mask_of(loss_func, micro_batch.inputs.loss_mask)\n", "hook",
          "contributes_nothing"),
    Fault("masked labels kept", "hosts/loss_head", "labels.masked_fill(loss_mask == 0, IGNORE_INDEX)", "labels",
          "bridge", "masked_labels"),
    Fault("valid labels ignored", "hosts/loss_head", "labels.masked_fill(loss_mask == 0, IGNORE_INDEX)",
          "labels.masked_fill(loss_mask != 1, IGNORE_INDEX)", "bridge", "masked_labels"),
    Fault("batch changed in place", "hosts/loss_head", "{**batch, \"labels\": labels.masked_fill(",
          "{**batch, \"labels\": labels.masked_fill_(", "bridge", "masked_labels"),
    # The host layer: no objective is missed, no number is another's
    Fault("pretrain of one module", "hosts/patches", "in list(_holders(original)):", "in [(owner, name)]:", "patches",
          "every_module"),
    Fault("objective that was never applied", "launch", "            prepared.check()", "            pass", "launch",
          "reaches_no_model"),
    Fault("loss from elsewhere", "hosts/hook", " or (torch.is_grad_enabled() and not micro_batch.differentiable)",
          "", "launch",
          "reaches_no_model"),
    Fault("model with its own loss", "hosts/hook",
          "    if head.inputs is not None:\n        head.reset()\n        raise",
          "    if False:\n        raise", "forward_step", "refused_by_name"),
    Fault("second forward pass wins", "hosts/loss_head", "if len(taken) > 1:", "if False:", "forward_step",
          "refused_by_name"),
    Fault("first tensor is the mask", "hosts/compat", "    if isinstance(bound.get(\"loss_mask\"), Tensor):",
          "    if arguments:\n        return arguments[0]\n    if False:", "hook", "found_by_its_name"),
    Fault("a pass that was passed over", "hosts/megatron_lm", "            run.begin()\n",
          "            run.failure = ''\n", "launch",
          "reaches_no_model"),
    Fault("channels that are nowhere", "hosts/iterations", "if self.named is not None and not self.named:", "if False:",
          "launch", "no_label_carries"),
    Fault("mask of other tokens", "hosts/loss_head", "if self.counted is not None and self.counted:", "if False:",
          "forward_step",
          "refused_by_name"),
    Fault("two values per token", "hosts/compat", "if count == 1 and", "if False and", "forward_step",
          "refused_by_name"),
    Fault("labels of 32 bits", "channels", "(channel >= 0) & (channel < channels)", "channel >= 0", "channels",
          "out_of_range"),
    Fault("channels without a name", "hosts/hook", "if named and (number > 0).any():", "if False:", "forward_step",
          "refused_by_name"),
    Fault("channels under a schedule plan", "hosts/compat", "        if config.channels:\n", "        if False:\n",
          "hook",
          "under_a_schedule_plan"),
    Fault("another loss is trained", "hosts/loss_head", "if self.computed and not self.trained:", "if False:", "launch",
          "reaches_no_model"),
    Fault("schedule plan with every label", "hosts/hook",
          'head.receive(call.arguments["labels"], call.arguments.get("loss_mask"))',
          'head.receive(call.arguments["labels"], None)', "forward_step", "schedule_plan"),
    Fault("heads train on ignored labels", "hosts/hook", "if loss_mask is None and compat.has_mtp(module.config)",
          "if False", "forward_step", "multi_token"),
    Fault("handle that removes nothing", "hosts/hook", "            self._undo.pop()()", "            self._undo.pop()",
          "forward_step", "removes_it"),
    Fault("total of each micro-batch", "hosts/hook", "share = 1.0 / self.micro_batches()", "share = 1.0",
          "forward_step",
          "totals_add_up"),
    Fault("every cross entropy", "hosts/compat", 'and fusion != "native":', 'and fusion == "te":', "hook",
          "fight_with"),
    Fault("weights for paths", "hosts/sft", "words = words[1::2]", "pass", "sft", "as_megatron_reads"),
    Fault("unequal keys refused", "hosts/sft", "            _refuse_damage(settings, None)",
          '            raise ValueError("damage")', "sft", "unequal_keys"),
    Fault("chunks in the dtype of autocast", "linear",
          "_logits(hidden, weight, columns, _buffer(hidden, [columns])) for", "hidden @ weight[columns].t() for",
          "linear",
          "autocast"),
    Fault("q that fp32 does not have", "objectives", "a < FP32.tiny:", "a == 0.0:", "objectives", "finite_in_fp32"),
    Fault("a name for each compilation", "compiled", "(_is_value(thing) and known == thing)", "False", "compile",
          "share_a_name"),
    Fault("a schedule of another run", "compiled", " and not isinstance(thing, Scheduled)", "", "compile",
          "share_a_name"),
    Fault("state hidden from Bridge", "hosts/bridge", "self.__signature__ = inspect.signature(forward_step)",
          "self.__signature__ = inspect.signature(lambda data_iterator, model: None)", "bridge", "masked_labels"),
    Fault("file over command line", "bridge", "OmegaConf.merge(block, OmegaConf.from_dotlist(ours))",
          "OmegaConf.merge(OmegaConf.from_dotlist(ours), block)", "bridge", "command_line_wins"),
    Fault("objective told to Bridge", "bridge", 'sections.pop("dft", None)', 'sections.get("dft", None)',
          "bridge", "command_line_wins"),
    Fault("unknown keys passed over", "bridge", "if key not in types and", "if False and", "bridge", "nearest_name"),
    Fault("keys of sections passed over", "bridge", 'check_keys(value, current, f"{path}{key}.")', "pass",
          "bridge", "nearest_name"),
    Fault("section without a class", "bridge", 'types.get(key, "Any"), re.I)', '"Any", re.I)',
          "bridge", "nearest_name"),
    Fault("words passed over", "bridge", 'if "=" not in word or word.startswith("~"):', "if False:",
          "bridge", "cannot_be"),
    Fault("recipe of the file over --recipe", "bridge", "return recipe or name,", "return name or recipe,",
          "bridge", "command_line_wins"),
    Fault("NeMo 3 without a word", "hosts/nemo", "{metadata.version('nemo-toolkit')}", "2.7.3", "nemo", "nemo_3"),
    # Before a run
    Fault("missing ranks not looked for", "doctor", "missing = _wait(range(run.world_size)", "missing = _wait(range(0)",
          "doctor", "missing_ranks_are_named"),
    Fault("sum not checked", "doctor", "if any(x != expected for x in sums):", "if False:", "doctor", "wrong_sum"),
    Fault("no deadline", "doctor", "    watchdog.start()\n", "", "doctor", "a_check_that_hangs and not ranks1"),
    Fault("trouble of another node forgotten", "doctor", "return int(troubles > 0 or bool(run.elsewhere))",
          "return int(troubles > 0)", "doctor", "trouble_on_one_node"),
    Fault("nodes that differ", "doctor", "if text and own in (first, node):", "if False:",
          "doctor", "nodes_that_differ"),
    Fault("loopback between nodes", "doctor", "address_of_own.is_loopback", "address_of_own.is_multicast",
          "doctor", "names_of_the_network"),
    Fault("first trouble of a layout only", "hosts/preflight", "yield from troubles\n    if",
          "yield from troubles[:1]\n    if", "doctor", "every_trouble and sizes"),
    Fault("padding without a word", "hosts/preflight", "elif padded > size and true is None:", "elif False:",
          "doctor", "worth_knowing"),
    # Data that is damaged
    Fault("text that is no UTF-8", "hosts/sft", "rows.validate(full=True)", "pass", "sft", "damaged_line_is_found"),
    Fault("nothing to train", "hosts/sft", "if len(replies.unique()) < len(rows):", "if False:",
          "sft", "damaged_line_is_found"),
    Fault("missing contents", "hosts/sft", "nulls or contents.type", "contents.type", "sft", "damaged_line_is_found"),
    Fault("any role", "hosts/sft", " or not set(roles.unique().to_pylist()) <= set(ROLES)", "",
          "sft", "damaged_line_is_found"),
    Fault("lines from 0", "hosts/sft", "enumerate(lines, 1)", "enumerate(lines)", "sft", "damaged_line_is_found"),
    Fault("empty lines unnamed", "data", 'yield line, "empty line"', "pass", "data", "each_bad_one_is_named"),
]
# fmt: on


def run_tests(folder: Path, files: Sequence[str], expression: str) -> None:
    """Run by a forked process, which has torch and pytest already and none of our modules; exits as pytest does."""
    with open(folder / "output", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(folder)
    sys.path[0] = os.environ["PYTHONPATH"] = str(folder)
    sys.dont_write_bytecode = True
    tests = [f"tests/test_{name}.py" for name in files]
    code = pytest.main(["-x", "--tb=line", "-p", "no:cacheprovider", *tests, "-k", expression])
    import megatron_dft

    assert folder in Path(megatron_dft.__file__).parents, "the tests ran on another library"
    os._exit(code)


def try_in_copy(fault: Fault | None, files: Sequence[str], expression: str) -> tuple[int, str]:
    """Exit status and output of the tests on a copy of the library, with the fault put in."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        for part in ("megatron_dft", "tests", "examples"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        if fault:
            module = folder / "megatron_dft" / f"{fault.module}.py"
            text = module.read_text()
            if text.count(fault.old) != 1:
                return -1, f"its old text is {text.count(fault.old)} times in {module.name}"
            module.write_text(text.replace(fault.old, fault.new))
        process = FORK.Process(target=run_tests, args=(folder, files, expression))
        process.start()
        process.join()
        return process.exitcode, (folder / "output").read_text()


def try_faults(faults: Sequence[Fault]) -> None:
    """Print a line for each fault; exits with the number of those that were not caught."""
    missed = 0
    for fault in faults:
        code, output = try_in_copy(fault, [fault.test], fault.expression)
        failed = [line for line in output.splitlines() if line.startswith("FAILED")]
        verdict, detail = ("SURVIVED", "") if code == 0 else ("ERROR", output[-2000:])
        if code == pytest.ExitCode.TESTS_FAILED and failed:
            verdict, detail = "caught", failed[0].partition("::")[2].partition(" - ")[0]
        print(f"{verdict:9} {fault.module + '.py':18} {fault.name:34} {detail}", flush=True)
        missed += verdict != "caught"
    sys.exit(missed)


def try_without_fault(faults: Sequence[Fault]) -> None:
    expression = " or ".join(sorted({f"({fault.expression})" for fault in faults}))
    code, output = try_in_copy(None, sorted({fault.test for fault in faults}), expression)
    print(f"the tests {'FAIL' if code else 'pass'} without a fault", output if code else "", flush=True)
    sys.exit(code)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-k", default="", help="only faults whose name contains this")
    parser.add_argument("--quarter", type=int, choices=range(4), help="only every fourth, from this one on")
    wanted = parser.parse_args()
    chosen = FAULTS if wanted.quarter is None else FAULTS[wanted.quarter :: 4]
    faults = [fault for fault in chosen if wanted.k in fault.name]
    if not faults:
        parser.error(f"no fault is named {wanted.k!r}")
    processes = [FORK.Process(target=try_without_fault, args=(faults,))]
    processes += [FORK.Process(target=try_faults, args=(faults[i::WORKERS],)) for i in range(WORKERS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    clean, *missed = (process.exitcode for process in processes)
    print(f"{len(faults) - sum(missed)} of {len(faults)} faults caught")
    return int(clean != 0 or sum(missed) > 0)


if __name__ == "__main__":
    sys.exit(main())
