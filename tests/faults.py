"""Mutation testing: each deliberate fault is inserted into a copy of the library, and the named tests must fail.

    python tests/faults.py [-k NAME]

The exit status is 0 if every fault is caught. These are errors as well: the old text of a fault does not occur exactly
once in its file, the selected tests fail without a fault, or a fault breaks the collection of the tests.
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
    test: str  # of tests/test_{test}.py
    expression: str  # pytest -k


ANY_SPLIT = ("vocab_parallel", "vocabulary_shards_merge_to_full_vocabulary")
FORMULA = ("vocab_parallel", "loss_and_gradient_match_formula")
MASKED = ("vocab_parallel", "masked_token_has_zero_loss_and_gradient")
POISON = ("vocab_parallel", "invalid_input_makes_only_its_token_nan")
LIMITS = ("objectives", "loss_and_gate_at_p_0_p_1_and_nan")
TP_FORMULA = (
    "tensor_parallel",
    "(test_loss_and_gradient_match_full_vocabulary or test_vocab_stats_match_full_vocabulary) and 2-dft",
)
WHOLE_COLLECTIVES = ("tensor_parallel", "forward_has_one_all_gather_and_backward_no_collective and 2")
SCHEDULE = ("objectives", "schedule_blends_from_nll_to_objective")
CP_RUN = ("layouts", "parallel_layout_matches_one_rank and CP and not x")
TRITON_FORMULA = ("triton", "loss_and_gradient_match_formula")
TRITON_SPLIT = ("triton", "vocabulary_shards_merge_to_full_vocabulary")
TRITON_TWIN = ("triton", "triton_matches_torch_backend")
TRITON_WIDTH = ("triton", "loss_supports_any_vocab_size")
HIDDEN = ("linear_fused", "linear_dft_loss_matches_full_logits")
MAIN_GRAD = ("loss_head", "gradient_accumulation_fusion_matches_megatron")
UNFUSED = ("loss_head", "token_chunks_add_to_main_grad_without_gradient_accumulation_fusion")
METRIC = ("metrics", "metric_is_weighted_sum_and_count")
FULL_METRICS = ("metrics", "full_metrics_match_formula")

# fmt: off
FAULTS = [
    # Vocabulary shards
    Fault("no rescaling to the global maximum", "ops/stats",
          'row["maximum"] - maximum', '0.0 * row["maximum"]', *ANY_SPLIT),
    Fault("rescale to maximum of shard 0", "ops/stats", 'row["maximum"].amax(0)', 'row["maximum"][0]', *ANY_SPLIT),
    Fault("no sum over shards", "ops/stats", '(row["sum"] * scale).sum(0)', '(row["sum"] * scale)[0]', *ANY_SPLIT),
    Fault("target of shard 0", "ops/stats", 'row["target_logit"].sum(0)', 'row["target_logit"][0]', *ANY_SPLIT),
    Fault("entropy not shifted", "ops/stats", ' + shift * row["sum"]', "", *ANY_SPLIT),
    Fault("entropy shifted twice", "ops/stats", "+ shift * row", "+ 2.0 * shift * row", *ANY_SPLIT),
    Fault("collision scaled once", "ops/stats", "scale.square()", "scale", *ANY_SPLIT),
    Fault("-inf shard as NaN", "ops/stats", 'row["maximum"].isneginf()', 'row["maximum"].isnan()', *ANY_SPLIT),
    Fault("-inf shard not cleared", "ops/torch_backend", "maximum.isneginf(), 0.0", "maximum.isnan(), 0.0", *ANY_SPLIT),
    Fault("padding keeps its bytes", "ops/torch_backend", "out[:, shard.columns :] = 0.0", "pass", *ANY_SPLIT),
    Fault("every shard owns column 0", "ops/torch_backend", "(-coefficient[rows] * owned)", "(-coefficient[rows])",
          *ANY_SPLIT),
    Fault("no shard offset", "ops/torch_backend", "target - shard.start", "target", *ANY_SPLIT),
    # Real ranks
    Fault("no gather", "ops/vocab_parallel", "group is None or group.size() == 1", "True", *TP_FORMULA),
    Fault("offset of rank 0", "ops/vocab_parallel", "VocabShard(start=rank * width", "VocabShard(start=0 * width",
          *TP_FORMULA),
    Fault("rank of the world", "ops/vocab_parallel", "self.tp_group.rank()", "torch.distributed.get_rank()",
          "tensor_parallel", "tp_group_within_world_matches_its_own_batch"),
    Fault("vocabulary of one shard", "ops/vocab_parallel", "sums[None], target, reference, shard.vocab_size,",
          "sums[None], target, reference, logits.shape[-1],",
          "tensor_parallel", "match_full_vocabulary and 2-entropy"),
    Fault("second collective", "ops/vocab_parallel", "    gathered = rows.new_empty",
          "    torch.distributed.all_reduce(rows.clone(), group=group)\n    gathered = rows.new_empty",
          *WHOLE_COLLECTIVES),
    Fault("sends unneeded statistics", "ops/vocab_parallel", "return self.objective.needs | self.statistics",
          'return frozenset({"entropy", "collision"})', *WHOLE_COLLECTIVES),
    Fault("largest logits not shifted", "ops/stats", "(shards[:, :1] + shards[:, -k:])", "shards[:, -k:]", *ANY_SPLIT),
    Fault("largest logits of shard 0", "ops/stats", "(shards[:, :1] + shards[:, -k:]).flatten(0, 1)",
          "(shards[:, :1] + shards[:, -k:])[0]", *ANY_SPLIT),
    Fault("no entry as the largest", "ops/torch_backend", "out[len(out) - top_k(needs) + k :] = -torch.inf", "pass",
          *ANY_SPLIT),
    Fault("median of one rank", "ops/stats", "torch.distributed.all_reduce(counts, group=group)", "pass",
          "tensor_parallel", "talr_uses_median_of_all_ranks and 2"),
    Fault("upper median", "ops/stats", "(until[-1:] - 1) // 2", "until[-1:] // 2",
          "tensor_parallel", "lower_median and 2"),
    Fault("NaN counted in the median", "ops/stats", "self.valid & ~self.logprob.isnan()", "self.valid", *LIMITS),
    Fault("ignored tokens in the median", "ops/stats", "self.valid & ~self.logprob.isnan()", "~self.logprob.isnan()",
          *FORMULA),
    Fault("median without its group", "hosts/loss_head", "if MEDIAN in config.objective.needs else {}",
          "if False else {}", "layouts", "objective_matches_one_rank and talr and 2-2"),
    Fault("gate above 1", "ops/objectives", "(self.k or 20)).clamp(max=1.0)", "(self.k or 20))",
          "objectives", "eaft_gate_is_1_above_ln_20"),
    Fault("gate above 1 in the kernel", "ops/triton_backend", "tl.where(uncertainty > 1.0, 1.0, uncertainty), first)",
          "uncertainty, first)", "triton", "eaft_gate_is_1_above_ln_20"),
    # Reference
    Fault("reference ratio inverted", "ops/stats", "(self.logprob - self.reference).clamp(max=LOG_RATIO_LIMIT)",
          "(self.reference - self.logprob).clamp(max=LOG_RATIO_LIMIT)",
          "reference", "test_loss_and_gradient_match_formula"),
    Fault("k3 without ln r", "ops/stats", "torch.expm1(-self.log_ratio) + self.log_ratio",
          "torch.expm1(-self.log_ratio)", "reference", "test_loss_and_gradient_match_formula and asft"),
    Fault("missing reference trains", "labels",
          "logprob.masked_fill(bits == 0, torch.nan)", "logprob",
          "reference", "label_without_reference_makes_only_its_token_nan"),
    Fault("ignored token without reference", "ops/vocab_parallel", " & (target != self.ignore_index)", "",
          "reference", "ignored_token_id_needs_no_reference"),
    Fault("NLL of an invalid token is finite", "ops/vocab_parallel", "target.masked_fill(reference.isnan() &",
          "target.masked_fill(reference.isnan() & False &",
          "reference", "label_without_reference_makes_only_its_token_nan"),
    # Weights
    Fault("weight not in the gradient", "hosts/loss_head", "upstream * weight)", "upstream)",
          "weights", "gradient_is_mean_of_the_reduction and 1 and not 2"),
    Fault("weight on the reported loss", "hosts/loss_head", "return loss.masked_fill(weight.isnan(), torch.nan)",
          "return loss * weight",
          "weights", "gradient_is_mean_of_the_reduction and 1 and not 2"),
    Fault("weight of another token", "hosts/loss_head", "_Weighted.apply(loss, inputs.weight)",
          "_Weighted.apply(loss, inputs.weight.roll(1, 1))",
          "weights", "gradient_is_mean_of_the_reduction and 1 and not 2"),
    Fault("divisor of tokens", "hosts/binding", "values[1] = micro_batch.inputs.count", "pass",
          "weights", "gradient_is_mean_of_the_reduction and sample and 1 and not 2"),
    Fault("count of masked conversations lost", "hosts/loss_head", "(loss_mask == 0) & (labels > IGNORE_INDEX)",
          "loss_mask == 0", "weights", "ignore_masked_keeps_counts"),
    Fault("missing weight is 1", "labels", "weight.masked_fill(missing, torch.nan)",
          "weight.masked_fill(missing, 1.0)", "weights", "label_without_weight_ends_the_run"),
    Fault("unused weight accepted", "hosts/binding", "if (rest >> WEIGHT > 0).any():", "if False:",
          "weights", "unused_weight_is_rejected"),
    Fault("weight rounded down", "labels", "((bits + (1 << 12)) >> 13)", "(bits >> 13)",
          "labels", "weight_has_11_significant_bits"),
    Fault("count carried by every conversation", "labels", "        if n == 0:\n", "        if n < 0:\n",
          "labels", "conversations_carry_weights_and_counts"),
    Fault("length of the last conversation", "labels", "factor[part] = exact / n", "factor[:] = exact / n",
          "labels", "conversations_carry_weights_and_counts"),
    Fault("sample without weights of the data", "labels", "factor = factor * weight", "pass",
          "labels", "weights_of_the_data_multiply"),
    Fault("weight for another reduction", "labels", "(bits == 0) | (kind != REDUCTIONS.index(reduction))", "bits == 0",
          "labels", "weight_for_another_reduction_is_missing"),
    Fault("counts rounded one by one", "labels", "math.floor(total + exact + 0.5) - math.floor(total + 0.5)",
          "round(exact)", "labels", "rounded_counts_add_up"),
    Fault("missing weight is silent without metrics", "hosts/loss_head",
          "return loss.masked_fill(weight.isnan(), torch.nan)", "return loss.view_as(loss)",
          "weights", "label_without_weight_is_nan_without_with_metrics"),
    Fault("reduction per micro-batch accepted", "hosts/compat",
          'config.by_conversation and not getattr(settings, "calculate_per_token_loss", True)', "False",
          "weights", "reduction_requires_per_token_loss"),
    Fault("two models of equal weights", "data/clean", 'if (first.reference or {})["weights"] ==', "if None ==",
          "clean", "files_that_do_not_fit_are_rejected"),
    Fault("weight of the previous turn", "data/tokens", "conversation.turns[0] if i == -1 else i",
          "conversation.turns[0]", "weights", "turns_have_their_weights"),
    Fault("adjacent turns merged", "data/tokens", "if spans[-1][2] != weight else", "if False else",
          "weights", "turns_have_their_weights"),
    Fault("token file with weights accepted", "hosts/token_data", "if weighted and not config.weights:",
          "if False:", "weights", "token_files_and_settings_must_agree"),
    Fault("channel kept in the label", "labels", "labels, labels & ~mask), value", "labels, labels), value",
          "reference", "label_carries_token"),
    Fault("compiled backward with the reference", "ops/compiled", "    target, _ = options.split(target, logits)\n", "",
          "reference", "compiled_loss_equals_eager"),
    Fault("linear-fused without split", "ops/linear_fused", "options.split(target.contiguous(), hidden)",
          "(target.contiguous(), None)", "reference", "test_loss_and_gradient_match_formula"),
    Fault("clipped to 0 where unknown", "ops/objectives", "stats.ratio.masked_fill(stats.ratio > 1.0 + self.eps, 0.0)",
          "torch.where(stats.ratio <= 1.0 + self.eps, stats.ratio, 0.0)",
          "reference", "label_without_reference_makes_only_its_token_nan and psft and not start"),
    # Gate and gradient
    Fault("gate differentiated", "ops/objectives", "gate * stats.nll), gate",
          "gate * stats.nll), gate * (1 + stats.logprob)", "objectives", "dft_gradient_raises_low_probability_targets"),
    Fault("no one-hot", "ops/torch_backend", "-coefficient[rows] * owned", "0.0 * coefficient[rows] * owned", *FORMULA),
    Fault("row 0's gate", "ops/torch_backend", "return (upstream * gate)", "return (upstream * gate.flatten()[0])",
          *FORMULA),
    Fault("mean upstream", "ops/torch_backend", "return (upstream *", "return (upstream.mean() *", *FORMULA),
    Fault("rounded twice", "ops/torch_backend", "        column, owned = _local_column(target[rows]",
          "        x.copy_(x.to(out.dtype))\n        column, owned = _local_column(target[rows]",
          "vocab_parallel", "gradient_is_rounded_once"),
    Fault("weight in the dtype of the logits", "ops/stats",
          "torch.float64 if x.dtype == torch.float64 else torch.float32", "x.dtype",
          "vocab_parallel", "loss_error_is_at_most_twice_that_of_torch_in_same_dtype"),
    Fault("maximum and log-sum added", "ops/torch_backend", "[merged.maximum, merged.log_sum, gate]",
          "[0.0 * merged.maximum, merged.log_sum + merged.maximum, gate]",
          "vocab_parallel", "shifted_logits_give_bitwise_equal_results"),
    Fault("gate 1 under return_nll", "ops/torch_backend", "merged.log_sum, gate]",
          'merged.log_sum, gate * 0 + 1 if return_nll else gate]',
          "vocab_parallel", "return_nll_keeps_gradient_of_objective"),
    Fault("return_nll ignored", "ops/torch_backend", '(-stats.logprob if return_nll else loss.clone())', "loss.clone()",
          "vocab_parallel", "return_nll_keeps_gradient_of_objective"),
    Fault("chunk read twice", "ops/torch_backend", "rows = index[first:last]", "rows = index[: last - first]",
          "vocab_parallel", "loss_is_independent_of_row_chunk_size"),
    # Masks, padding, NaN and inf
    Fault("loss not masked", "ops/objectives", "return loss.masked_fill(~stats.valid, 0.0), ", "return loss, ",
          *MASKED),
    Fault("gradient not masked", "ops/objectives", ", gate.masked_fill(~stats.valid, 0.0)", ", gate", *MASKED),
    Fault("0 x NaN", "ops/torch_backend",
          "return (upstream * gate).masked_fill((upstream == 0.0) | (gate == 0.0), 0.0)",
          "return upstream * gate", *MASKED),
    Fault("statistics not masked", "ops/stats", "entropy.masked_fill(~valid, 0.0)", "entropy",
          "vocab_parallel", "vocab_stats_match_fp64"),
    Fault("ignored rows keep their bytes", "ops/torch_backend", "out.index_fill_(0, (~live).nonzero().squeeze(1), 0.0)",
          "pass",
          "vocab_parallel", "batch_without_targets_has_zero_loss_and_gradient"),
    Fault("ignore_index fixed", "ops/torch_backend", "token_stats(merged, target != ignore_index,",
          "token_stats(merged, target != -100,",
          "vocab_parallel", "ignore_index_may_be_token_id"),
    Fault("true_vocab_size ignored", "ops/vocab_parallel",
          "if self.true_vocab_size is None else self.true_vocab_size", "",
          *FORMULA),
    Fault("NaN loss, finite gradient", "ops/objectives", "gate.masked_fill(stats.logprob.isnan(), torch.nan)",
          "gate", *POISON),
    Fault("NaN of an invalid id removed", "ops/torch_backend",
          "masked_fill(outside, torch.nan)", "masked_fill(outside, 0.0)",
          *POISON),
    Fault("unknown ids accepted", "ops/vocab_parallel", "| (target >= vocab_size)", "",
          "vocab_parallel", "invalid_target_raises_under_anomaly_detection"),
    Fault("ignored ids refused", "ops/vocab_parallel", "(target != ignore_index) & ((target", "((target",
          "vocab_parallel",
          "invalid_target_raises_under_anomaly_detection"),
    Fault("-inf x 0", "ops/torch_backend", "torch.clamp(x, min=UNDERFLOW, out=spare[: len(x)])",
          "spare[: len(x)].copy_(x)", "vocab_parallel", "minus_inf_logits_give_no_nan"),
    Fault("clamp removed", "ops/stats", "(distance - merged.log_sum).clamp(max=0.0)", "(distance - merged.log_sum)",
          "objectives", "rounding_keeps_probability_at_most_one"),
    Fault("tied target not top-1", "ops/stats", "distance >= 0.0", "distance > 0.0",
          "vocab_parallel", "vocab_stats_counts_tied_target_as_top_1"),
    # Input tensors and outputs: writes, views, versions
    Fault("forward writes", "ops/torch_backend", "scratch[: last - first].copy_(logits[first:last, :columns])",
          "logits[first:last, :columns].to(scratch.dtype)",
          "vocab_parallel", "forward_never_writes_to_logits"),
    Fault("no version guard", "ops/vocab_parallel", "rows = logits.reshape", "rows = logits.data.reshape",
          "vocab_parallel", "inplace_backward_raises_on_reuse_of_overwritten_logits"),
    Fault("leaf overwritten", "ops/vocab_parallel", "if options.inplace_backward and", "if False and",
          "vocab_parallel", "inplace_backward_rejects_leaf_logits"),
    Fault("never in place", "ops/vocab_parallel", "rows if inplace else torch.empty_like(rows)",
          "torch.empty_like(rows)", "vocab_parallel", "inplace_backward_overwrites_logits_with_gradient"),
    Fault("loss is a view", "ops/torch_backend", 'return (-stats.logprob if return_nll else loss.clone())',
          'return torch.stack([-stats.logprob if return_nll else loss] * 2)[0]', "vocab_parallel",
          "loss_is_contiguous_and_not_view"),
    Fault("fp32 copy of all logits", "ops/vocab_parallel", "    sums = kernels.shard_stats",
          "    logits = logits.to(accumulation_dtype(logits), copy=True)\n    sums = kernels.shard_stats",
          "performance", "memory and float32"),
    # The Triton kernels
    Fault("masked row read", "ops/triton_backend", "    if target == ignore_index:",
          "    if target == ignore_index - 1:",
          "triton", "rows_are_not_read and masked-0"),
    Fault("row with zero gradient read", "ops/triton_backend",
          "    if coefficient == 0.0:", "    if coefficient == 1e30:",
          "triton", "rows_are_not_read and zero_upstream"),
    Fault("row offset in int32", "ops/triton_backend", "row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)",
          "triton", "kernels_support_offsets_beyond_2_to_31"),
    Fault("row offset in int32, backward", "ops/triton_backend", "(program // tiles).to(tl.int64)", "program // tiles",
          "triton", "kernels_support_offsets_beyond_2_to_31"),
    Fault("edge not read", "ops/triton_backend", "X + begin + column, is_edge, -INF",
          "X + begin + column, column < 0, -INF", *TRITON_WIDTH),
    Fault("edge of the gradient not written", "ops/triton_backend", "(vectors * VEC < width):", "(width < 0):",
          *TRITON_WIDTH),
    Fault("edge counted twice", "ops/triton_backend", "tl.where(index < head, index, index + body)", "index",
          *TRITON_WIDTH),
    Fault("tail of a tile read twice", "ops/triton_backend", "vector * VEC + item, vector < vectors, -INF",
          "vector * VEC + item, lane < vectors, -INF", *TRITON_WIDTH),
    Fault("padding read", "ops/triton_backend", "first, vectors = _body(begin, columns, VEC)",
          "first, vectors = _body(begin, columns + VEC - 1, VEC)",
          "triton", "padding_columns_are_ignored_and_get_zero_gradient"),
    Fault("padding given a gradient", "ops/triton_backend", "tl.where(column < end, error, 0.0)", "error",
          "triton", "padding_columns_are_ignored_and_get_zero_gradient"),
    Fault("lane not rescaled", "ops/triton_backend", "s * scale + tl.sum(e, 1), a, q", "s + tl.sum(e, 1), a, q",
          *TRITON_WIDTH),
    Fault("lanes not merged", "ops/triton_backend", "tl.sum(s * scale, 0)", "tl.sum(s, 0)", *TRITON_WIDTH),
    Fault("entropy of lanes not shifted", "ops/triton_backend", "tl.sum((a + shift * s) * scale, 0)",
          "tl.sum(a * scale, 0)", "triton", "entropy_and_collision_support_any_vocab_size"),
    Fault("entropy of a lane not shifted", "ops/triton_backend", "(a + shift * s) * scale + tl.sum(distance * e, 1)",
          "a * scale + tl.sum(distance * e, 1)", "triton", "entropy_and_collision_support_any_vocab_size"),
    Fault("collision of lanes scaled once", "ops/triton_backend", "q * (scale * scale) + tl.sum(e * e, 1)",
          "q * scale + tl.sum(e * e, 1)", "triton", "entropy_and_collision_support_any_vocab_size"),
    Fault("ranks not rescaled", "ops/triton_backend", "s += part_s * scale", "s += part_s", *TRITON_SPLIT),
    Fault("entropy of ranks not shifted", "ops/triton_backend", "0.0) + shift * part_s) * scale", "0.0)) * scale",
          *TRITON_SPLIT),
    Fault("-inf rank as NaN", "ops/triton_backend", "return tl.where(m == -INF, 0.0, m - larger)", "return m - larger",
          *TRITON_SPLIT),
    Fault("no shard offset in Triton", "ops/triton_backend", "tl.load(TARGET + row) - start", "tl.load(TARGET + row)",
          *TRITON_SPLIT),
    Fault("target of every rank", "ops/triton_backend", "owned = (target >= start) & (target < start + columns)",
          "owned = target >= start", *TRITON_SPLIT),
    Fault("no one-hot in Triton", "ops/triton_backend", "tl.where(column == target, softmax - coefficient, softmax)",
          "softmax", *TRITON_FORMULA),
    Fault("stride of upstream", "ops/triton_backend", "UPSTREAM + row * upstream_stride", "UPSTREAM + row",
          "triton", "(loss_supports_any_strides or target_and_upstream_gradient_support_any_stride)"),
    Fault("stride of targets", "ops/vocab_parallel", "target=target.contiguous().view(-1)", "target=target.reshape(-1)",
          "triton", "(loss_supports_any_strides or target_and_upstream_gradient_support_any_stride)"),
    Fault("maximum and log-sum added, Triton", "ops/triton_backend",
          "tl.exp2((x - maximum) * LOG2_E) * (coefficient * tl.exp(-log_sum))",
          "tl.exp2((x - (maximum + log_sum)) * LOG2_E) * coefficient",
          "triton", "shifted_logits_give_bitwise_equal_results"),
    Fault("0 x NaN in Triton", "ops/triton_backend",
          "tl.where((upstream == 0.0) | (gate == 0.0), 0.0, upstream * gate)",
          "upstream * gate", "triton", "masked_token_has_zero_loss_and_gradient"),
    Fault("NaN of an invalid id removed in Triton", "ops/triton_backend",
          'tl.where(outside, float("nan"), logit)', "logit",
          "triton", "invalid_input_makes_only_its_token_nan"),
    Fault("finite gradient beside a NaN loss", "ops/triton_backend", "tl.where(logprob != logprob, logprob, gate)",
          "gate",
          "triton", "invalid_input_makes_only_its_token_nan"),
    Fault("-inf x 0 in Triton", "ops/triton_backend", "return tl.maximum(distance, UNDERFLOW)", "return distance",
          "triton", "minus_inf_logits_give_no_nan"),
    Fault("return_nll ignored in Triton", "ops/triton_backend", "-logprob if NLL else loss", "loss", *TRITON_TWIN),
    Fault("blend ignored", "ops/triton_backend", "    if BLENDED:", "    if False:", *TRITON_TWIN),
    Fault("blend of the loss alone, Triton", "ops/triton_backend", "gate = (1.0 - blend) + _share(blend, gate)",
          "gate = gate", *TRITON_TWIN),
    Fault("cancellation in Triton", "ops/triton_backend", "tl.where(tl.abs(x) < 0.7, x * series, tl.exp(x) - 1.0)",
          "tl.exp(x) - 1.0", "triton", "tsallis_with_small_q_keeps_precision"),
    Fault("mean of the last programs missing", "ops/triton_backend", "range(0, programs, TOKENS)",
          "range(0, 1, TOKENS)", "triton", "cayley_mean_covers_all_programs"),
    Fault("mean of invalid tokens", "ops/triton_backend", "counted = valid & (logprob == logprob)",
          "counted = logprob == logprob", *TRITON_FORMULA),
    Fault("mean of NaN", "ops/triton_backend", "counted = valid & (logprob == logprob)", "counted = valid",
          "triton", "invalid_input_makes_only_its_token_nan"),
    Fault("shard offset in int32", "ops/triton_backend", "_difference(tl.load(part, real, -INF), maximum)",
          "_difference(tl.load(SHARDS + _ * K * n + token, real, -INF), maximum)",
          "triton", "kernels_support_offsets_beyond_2_to_31"),
    Fault("ratio not limited in Triton", "ops/triton_backend",
          "tl.where(log_ratio > RATIO_LIMIT, RATIO_LIMIT, log_ratio)", "log_ratio",
          "triton", "objectives_with_reference_match_torch_backend"),
    Fault("parameters swapped", "ops/triton_backend", '("mix", o.alpha, 1.0 - o.alpha)',
          '("mix", 1.0 - o.alpha, o.alpha)',
          *TRITON_FORMULA),
    Fault("a subclass's formula lost", "ops/triton_backend", "FORMS.get(type(base), lambda",
          "FORMS.get(DFT if isinstance(base, DFT) else type(base), lambda", "triton", "custom_objective_is_applied"),
    Fault("no version guard in Triton", "ops/triton_backend", "torch.autograd.graph.increment_version(out)", "pass",
          "triton", "inplace_backward_raises_on_reuse_of_overwritten_logits"),
    Fault("host-device sync", "ops/triton_backend", "    shape, n = target.shape, target.numel()\n",
          "    shape, n = target.shape, target.numel()\n    bool((target == ignore_index).all())\n",
          "triton", "loss_launches_only_its_kernels"),
    Fault("zero gradients materialized", "ops/vocab_parallel", "    ctx.set_materialize_grads(False)", "    pass",
          "triton", "loss_launches_only_its_kernels"),
    Fault("two-byte loads", "ops/triton_backend", "vector * VEC + item, vector < vectors, -INF",
          "vector * VEC + item, vector * VEC + item < columns, -INF",
          "triton_compiled", "stats_kernel_loads_16_bytes_at_any_width"),
    Fault("two-byte stores", "ops/triton_backend", "_write_error(X, OUT, column, vector < vectors,",
          "_write_error(X, OUT, column, column < width,",
          "triton_compiled", "gradient_kernel_loads_and_stores_16_bytes_at_any_width"),
    Fault("two exponentials for each logit", "ops/triton_backend", "larger = tl.maximum(m, tl.max(x, 1))",
          "larger = tl.maximum(m, tl.max(x, 1)) + 0.0 * tl.sum(tl.exp2(x), 1)",
          "triton_compiled", "stats_kernel_loads_16_bytes_at_any_width"),
    Fault("another objective in the graph", "ops/compiled",
          "of_graph_name(objective),\n        tp_group=_group(tp_group),\n        ignore_index",
          'of_graph_name("dft"),\n        tp_group=_group(tp_group),\n        ignore_index',
          "compile", "compiled_loss_is_bitwise_equal_to_eager"),
    Fault("one name for all objects", "ops/objectives", 'f"{self} #{len(_OF_GRAPHS)}"', '"object"',
          "compile", "compiled_loss_uses_options_of_each_call"),
    Fault("parameter without a guard", "ops/compiled", "if value != (known", "if False and value != (known",
          "compile", "compiled_loss_uses_options_of_each_call"),
    Fault("object without a guard", "ops/compiled", 'objective.__match_args__ if objective.by_value else ("serial",)',
          'getattr(objective, "__match_args__", ())', "compile", "compiled_loss_distinguishes"),
    Fault("every class by its fields", "ops/objectives", "cls.__module__ == __name__", "True", "compile",
          "compiled_loss_distinguishes_custom"),
    Fault("copies with one serial number", "ops/objectives", 'if name != "serial"', "", "compile",
          "compiled_loss_distinguishes_custom"),
    # Objectives
    Fault("0 x inf", "ops/objectives", "torch.where(gate == 0.0, 0.0, gate * stats.nll)", "gate * stats.nll", *LIMITS),
    Fault("cancellation near 1", "ops/objectives", "-torch.expm1(a * stats.logprob) / a",
          "(1 - torch.exp(a * stats.logprob)) / a", "objectives", "tsallis_approaches_nll_for_small_q"),
    Fault("cayley over all tokens", "ops/objectives", "stats.valid & p.isfinite()", "p.isfinite()", *FORMULA),
    Fault("cayley mean includes NaN", "ops/objectives", "stats.valid & p.isfinite()", "stats.valid", *POISON),
    Fault("threshold hides NaN", "ops/objectives", "(stats.prob < self.lo) | (stats.prob > self.hi)",
          "~((stats.prob >= self.lo) & (stats.prob <= self.hi))", *LIMITS),
    Fault("threshold keeps the gate", "ops/objectives", "gate.masked_fill(outside, 0.0)", "gate", *FORMULA),
    Fault("dft without its weight", "ops/objectives", "return stats.prob\n", "return torch.ones_like(stats.prob)\n",
          "objectives", "dft_loss_peaks_at_one_over_e"),
    Fault("blend inverted", "ops/objectives", "_share(1.0 - b, stats.nll) + _share(b, loss)",
          "_share(b, stats.nll) + _share(1.0 - b, loss)", *SCHEDULE),
    Fault("blend of the loss alone", "ops/objectives", "(1.0 - b) + _share(b, gate)", "gate", *SCHEDULE),
    Fault("ramp one iteration late", "ops/objectives", "(iteration - self.start)", "(iteration - 1 - self.start)",
          *SCHEDULE),
    Fault("0 x inf in a blend", "ops/objectives", "torch.where(part == 0.0, 0.0, part * x)", "part * x",
          "objectives", "schedule_ends_are_bitwise_equal_to_objectives"),
    Fault("blend fixed in a captured graph", "hosts/loss_head",
          "self._blended.blend.fill_(self._objective.blend_at(iteration))", "self._blended = None",
          "loss_head", "schedule_updates_blend_tensor_in_place"),
    # Inside a host model
    Fault("batch and sequence swapped in the host", "hosts/loss_head", "return labels.transpose(0, 1).contiguous()",
          "return labels.reshape(labels.shape[::-1])", "binding", "nll_gradient_matches_megatron"),
    Fault("statistics transposed", "hosts/loss_head", "x.reshape(self.shape).transpose(0, 1).reshape(-1)",
          "x.reshape(-1)", "binding", "report_matches_token_stats_of_micro_batches"),
    Fault("no tensor-parallel group", "hosts/loss_head", "config.options(compat.tp_group(model), **groups)",
          "config.options(**groups)", "binding", "nll_gradient_matches_megatron"),
    Fault("MTP heads use the objective", "hosts/loss_head", "            if labels is not self.inputs.labels:",
          "            if False:",
          "binding", "(mtp_keeps_nll_unless_requested or mtp_gradient_is_equal_in_every_variant)"),
    Fault("report without the loss mask", "hosts/binding", "        mask = micro_batch.pick(mask)",
          "        mask = micro_batch.pick(torch.ones_like(mask))",
          "binding", "report_excludes_masked_tokens_with_inf_or_nan_loss"),
    Fault("inf of a masked token", "hosts/binding",
          "losses = losses.masked_fill(mask.reshape(losses.shape) == 0.0, 0.0)", "pass",
          "binding", "report_excludes_masked_tokens_with_inf_or_nan_loss"),
    Fault("wrong gradient under CP accepted", "hosts/compat", "cp > 1 and", "cp > 2 and",
          "binding", "check_settings_rejects_incompatible_settings"),
    Fault("contiguous slices", "testing/cpu_attention", "torch.minimum(chunk, chunks - 1 - chunk) == cp_rank",
          "chunk // 2 == cp_rank", "cpu_host", "partition_gives_each_rank_front_and_back_chunk_of_documents"),
    Fault("attention across documents", "testing/cpu_attention",
          "(query_document[:, None] == key_document) & ", "", "cpu_host", "attention_matches_formula"),
    # Fused output layer
    Fault("chunks without offset", "ops/stats", "self.start + columns.start", "self.start", *HIDDEN),
    Fault("padding within a chunk", "ops/stats",
          "min(max(self.columns - columns.start, 0), columns.stop - columns.start)",
          "columns.stop - columns.start", *HIDDEN),
    Fault("products of the last chunk", "ops/linear_fused", "total.addmm_(left, right)",
          "torch.mm(left, right, out=total)", *HIDDEN),
    Fault("hidden gradient of one rank", "ops/linear_fused", "    if tp_group is None or tp_group.size() == 1:",
          "    if True:", *HIDDEN),
    Fault("hidden gradient summed before the last chunk", "ops/linear_fused", "if rows is chunks[-1]:",
          "if rows is chunks[0]:", *HIDDEN),
    Fault("expected gradient of the first tokens", "ops/linear_fused", "upstream=expected[rows]",
          "upstream=expected[: len(logits)]", *HIDDEN),
    Fault("reference of the first tokens", "ops/linear_fused", "else reference[rows]",
          "else reference[: len(target[rows])]", "reference", "loss_and_gradient_match_formula"),
    Fault("unexpected gradient accepted", "ops/linear_fused", "(upstream - expected).abs() <= 1e-6 * expected.abs()",
          "(upstream - expected).abs() >= 0.0", "linear_fused", "unexpected_upstream_makes_gradients_nan"),
    Fault("NaN gradient accepted", "ops/linear_fused", "~((upstream - expected).abs() <= 1e-6 * expected.abs())",
          "((upstream - expected).abs() > 1e-6 * expected.abs())",
          "linear_fused", "unexpected_upstream_makes_gradients_nan"),
    Fault("gradient of a masked token compared", "ops/linear_fused", "expected.abs()) & valid).any()",
          "expected.abs())).any()", "linear_fused", "unexpected_upstream_makes_gradients_nan"),
    Fault("weight gradient kept in spite of another upstream", "ops/linear_fused", "self.total.mul_(factor)",
          "pass", "linear_fused", "unexpected_upstream_makes_gradients_nan"),
    Fault("main_grad kept in spite of another upstream", "hosts/loss_head", "self.total[:1].mul_(factor)",
          "pass", "loss_head", "unexpected_upstream_raises_with_its_reason"),
    Fault("gradient of forward used twice", "ops/linear_fused", "weight_gradient), ctx.gradients = ctx.gradients, None",
          "weight_gradient) = ctx.gradients", "linear_fused", "gradient_in_forward_raises_in_second_backward"),
    Fault("loss scale ignored", "hosts/loss_head", "if self.model.config.grad_scale_func is not None:", "if False:",
          "loss_head", "gradient_in_forward_contains_loss_scale_and_loss_mask"),
    Fault("weight of 1 expected", "hosts/loss_head", "for factor in (inputs.loss_mask, inputs.weight):",
          "for factor in (inputs.loss_mask,):", "weights", "gradient_is_mean_of_the_reduction and token"),
    Fault("empty micro-batch verified", "hosts/loss_head", "self.verified = bool(valid.any())",
          "self.verified = True", "loss_head", "unexpected_upstream_raises_with_its_reason"),
    Fault("first backward not checked", "hosts/loss_head", "            self.check_tokens()\n            self.verified",
          "            self.verified", "loss_head", "unexpected_upstream_raises_with_its_reason"),
    Fault("unused gradient accepted", "hosts/loss_head", "        if self.unused:",
          "        if False:", "loss_head", "forward_whose_gradient_is_not_used_raises"),
    Fault("gradient in forward without per-token loss", "hosts/compat",
          'if config.token_chunk is not None:\n        if not getattr(settings, "calculate_per_token_loss", True):',
          "if config.token_chunk is not None:\n        if False:",
          "loss_head", "token_chunk_is_rejected_where_gradient_in_forward_is_impossible"),
    Fault("gradient in forward for an objective of the batch", "config",
          "if self.token_chunk is not None and not self.objective.per_token:", "if False:",
          "config", "from_mapping_rejects_invalid_settings"),
    Fault("main_grad in fp16", "hosts/compat", "if in_fp16 or", "if",
          "binding", "check_settings_requires_fp32_main_grad"),
    Fault("main_grad in bf16", "hosts/loss_head", "if summed and weight.main_grad.dtype !=", "if False and 0 !=",
          "loss_head", "token_chunk_is_rejected_where_gradient_in_forward_is_impossible"),
    Fault("unused gradients of an earlier step", "hosts/binding", "binding.head.unused = 0", "pass",
          "loss_head", "forward_whose_gradient_is_not_used_raises"),
    Fault("objectives of the user are per token", "ops/objectives", "cls.per_token = of_this_module",
          "cls.per_token = True", "linear_fused", "rejects_invalid_options"),
    Fault("hidden gradient summed in bf16", "ops/linear_fused", "dtype=accumulation_dtype(hidden)",
          "dtype=hidden.dtype", "linear_fused", "hidden_gradient_is_accumulated_over_chunks_in_fp32"),
    Fault("chunks saved without grad", "ops/linear_fused", "if any(ctx.needs_input_grad) else 0", "",
          "linear_fused", "keep_chunks_saves_nothing_without_grad"),
    Fault("saved chunks recomputed", "ops/linear_fused", "logits = kept[i] if i < len(kept) else _logits(hidden,",
          "logits = _logits(hidden,", "linear_fused", "keep_chunks_skips_recompute_of_saved_logits"),
    Fault("matmul for a frozen weight", "ops/linear_fused",
          "into() if ctx.needs_input_grad[1] else", "into() if True else",
          "linear_fused", "frozen_input_gets_no_gradient_and_no_matmul"),
    Fault("masked tokens of another index", "ops/compaction", "(target != ignore_index).nonzero()",
          "(target != -100).nonzero()", "linear_fused", "ignored_tokens_skip_output_layer"),
    Fault("losses in another order", "ops/compaction", "loss.new_zeros(len(target)).index_copy(0, rows, loss)",
          "torch.cat([loss, loss.new_zeros(len(target) - len(rows))])", *HIDDEN),
    Fault("gradient of no row", "ops/compaction", ".index_copy_(0, rows, gradient)", "", *HIDDEN),
    Fault("batch without tokens", "ops/compaction",
          "rows if len(rows) else rows.new_zeros(min(1, len(target)))", "rows",
          "linear_fused", "saves_nothing_without_grad or batch_without_targets"),
    Fault("sequence slice of the first rank", "ops/compaction",
          "slice(tp_group.rank() * len(hidden), (tp_group.rank() + 1) *",
          "slice(0, 1 *", *HIDDEN),
    Fault("loss mask ignored", "hosts/loss_head", "if mask is not None:", "if False:",
          "binding", "model_output_is_nll_and_zero_where_masked"),
    Fault("no all-reduce of the hidden gradient", "hosts/loss_head", "allreduce_dgrad=True", "allreduce_dgrad=False",
          "loss_head", "gradient_accumulation_fusion_matches_megatron"),
    Fault("output layer bypassed after an error", "hosts/loss_head",
          'vars(self.model.output_layer).pop("forward", None)', "pass",
          "loss_head", "forward_without_labels_returns_logits_even_after_error"),
    Fault("hooks of the layer skipped", "hosts/loss_head", "in list(layer._forward_pre_hooks.items()):",
          "in []:", "loss_head", "output_layer_pre_hooks_run_before_weight_is_read"),
    Fault("main_grad of the first chunk", "hosts/loss_head", "gradient, self.total[columns]",
          "gradient, self.total[: gradient.shape[1]]", *MAIN_GRAD),
    Fault("weight gradient in a buffer of its own", "hosts/loss_head",
          'elif upstream is not None and hasattr(weight, "main_grad"):', "elif False:", *UNFUSED),
    Fault("weight gradient added twice", "hosts/loss_head", "return torch.zeros_like(self.weight)",
          "return torch.ones_like(self.weight)", *UNFUSED),
    Fault("gradient reduced twice", "hosts/loss_head", "self.weight.grad_added_to_main_grad = True", "pass",
          *MAIN_GRAD),
    Fault("garbage for tied embeddings", "hosts/loss_head", "make = torch.zeros_like if", "make = torch.ones_like if",
          *MAIN_GRAD),
    Fault("unsupported compaction accepted", "hosts/compat",
          "if config.compact_masked_tokens and obstacle:", "if False:",
          "loss_head", "unsupported_compaction_is_off_by_default_and_rejected_on_request"),
    Fault("chunks of a quantized weight", "hosts/compat", "weight.element_size() < 2", "False", "loss_head",
          "linear_fused_is_rejected_where_unsupported and fp8"),
    # Runs: layouts, iterations, checkpoints
    Fault("loss bound on the first virtual stage only", "hosts/binding", "for chunk in model_chunks:",
          "for chunk in model_chunks[:1]:", "layouts", "parallel_layout_matches_one_rank and interleaved and not DP"),
    Fault("mean of means", "metrics", "[sums, weight.sum().expand_as(sums)]",
          "[sums / weight.sum().clamp(min=1.0), torch.ones_like(sums)]", *CP_RUN),
    Fault("micro-batches without context parallelism", "hosts/iterations",
          "get_data_parallel_world_size(with_context_parallel=True)", "get_data_parallel_world_size()", "layouts",
          "parallel_layout_matches_one_rank and CP and not x and not hybrid"),
    Fault("micro-batches of one rank", "hosts/iterations", "get_num_microbatches() * ", "get_num_microbatches() * 0 + ",
          "launch", "valid_tokens_are_summed_over_data_parallel_ranks"),
    Fault("validation as the host averages", "hosts/iterations",
          " | {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}",
          "", "launch",
          "validation_is_mean_over_tokens"),
    Fault("validation sums not reset", "metrics", "self._sums.zero_()", "pass",
          "launch", "validation_is_mean_over_tokens"),
    # Histograms and channels
    Fault("error norm without the target", "ops/stats", "1.0 - 2.0 * self.prob + self.collision",
          "self.collision", *FULL_METRICS),
    Fault("gradient without the gate", "metrics", "stats.gate * stats.error", "stats.error", *FULL_METRICS),
    Fault("tokens and gradient swapped", "metrics", "torch.cat([one, norm])", "torch.cat([norm, one])", *FULL_METRICS),
    Fault("p = 1 beyond the bins", "metrics", "clamp(0, BINS - 1)", "remainder(BINS)",
          "metrics", "histogram_puts_probability_of_one_in_last_bin"),
    Fault("total divided by count", "metrics", "name: total if is_total(name) else total / count\n",
          "name: total / max(count, 1)\n", "metrics", "full_metrics_match_formula"),
    Fault("unnamed channel counted as the last", "metrics", "number >= channels, 0)",
          "number >= channels, channels - 1)", *FULL_METRICS),
    Fault("missing channel is NaN", "metrics", "            if count or is_total(name)\n", "", "metrics",
          "full_metrics_sum_over_micro_batches_and_omit_empty_channels"),
    Fault("masked token in a histogram", "metrics",
          "torch.where(weight > 0.0, columns.flatten(1).double() * weight, 0.0)",
          "columns.flatten(1).double() * weight", "metrics", "nan_token_affects_only_its_channel"),
    Fault("channel on ignored labels", "labels", "torch.where(labels < 0, labels, (labels &",
          "torch.where(labels < -500, labels, (labels &",
          "labels", "parts_of_a_label_are_independent"),
    Fault("channel left on labels", "labels", "torch.where(known, rest, labels)", "labels",
          "labels", "parts_of_a_label_are_independent"),
    Fault("channel of the previous token", "hosts/sft", "torch.arange(1, len(sample[\"labels\"]) + 1",
          "torch.arange(0, len(sample[\"labels\"])", "sft", "channel_of_label_follows_target_token_at_boundary"),
    Fault("channels reversed", "hosts/binding", "mask, micro_batch.channel)",
          "mask, None if micro_batch.channel is None else micro_batch.channel.flip(0))",
          "binding", "full_metrics_match_tokens_of_callback"),
    Fault("last mean of a channel not kept", "hosts/iterations", "self._known[name] = losses[name]", "pass", "binding",
          "full_metrics_match_tokens_of_callback"),
    Fault("tokens of the callback transposed", "hosts/loss_head", "x.view(self.shape[::-1]).transpose(0, 1)",
          "x.view(self.shape)", "binding", "full_metrics_match_tokens_of_callback"),
    Fault("positions of dropped tokens lost in the callback", "hosts/loss_head", "index_copy(0, self.rows, x)",
          "index_copy(0, torch.arange(len(x)), x)", "binding", "full_metrics_match_tokens_of_callback"),
    # Statistics of the data, schedules, checkpoints
    Fault("dataset statistics of masked tokens", "advisor/statistics",
          "torch.where(batch.stats.valid, batch.loss_mask.double(), 0.0)",
          "batch.loss_mask.double().fill_(1.0)", "advisor_statistics",
          "dataset_statistics_are_counted_by_channel_and_additive"),
    Fault("dataset statistics without the error norm", "advisor/statistics", "loss, gate, gate * stats.error)",
          "loss, gate, gate)",
          "advisor_statistics", "dataset_statistics_of_objective_match_formula"),
    Fault("advice inverted", "advisor/statistics", "if accuracy > KNOWN", "if accuracy < KNOWN",
          "advisor_statistics", "advice_depends_on_top1_accuracy"),
    Fault("labels of the advisor not shifted", "advisor/hugging_face", "~torch.from_numpy(sequence.trained[1:])",
          "~torch.from_numpy(sequence.trained[:-1])",
          "advisor_hugging_face", "statistics_match_fp64_logits and Llama"),
    Fault("output layer of the advisor at all tokens", "advisor/hugging_face",
          "return hidden.flatten(0, -2)[places][None], *others", "return inputs",
          "advisor_hugging_face", "output_layer_receives_trained_tokens_only"),
    Fault("advisor evaluates the first records", "advisor/samples", "key=lambda _: keys.random()", "key=lambda _: 0",
          "advisor_hugging_face", "advise_tokens_limits_random_sample"),
    # Chat data
    Fault("label of the token itself", "data/token_file", "targets, given = places[trains] - 1,",
          "targets, given = places[trains],", "data", "sample_of_shifts_pads_and_masks"),
    Fault("label of the next conversation", "data/token_file", "trains = within > 0", "trains = places > 0", "data",
          "sample_of_never_trains_on_first_token"),
    Fault("positions not reset per conversation", "data/token_file",
          "np.arange(length) - np.repeat(cu_seqlens[:-1], sizes)",
          "np.arange(length)", "data", "sample_of_shifts_pads_and_masks"),
    Fault("conversations without their padding", "data/token_file",
          "padded = -(-row.lengths // header.multiple) * header.multiple", "padded = row.lengths", "data",
          "sample_of_shifts_pads_and_masks"),
    Fault("first token trains", "data/tokens", "spans[0] = (1, *spans[0][1:])", "pass", "data",
          "empty_prompt_report_counts_trained_tokens"),
    Fault("last tokens of a character dropped", "data/tokens",
          "    last = _token_at(encoding, end, len(text))\n    last = count if last is None else last\n",
          "    last = _token_at(encoding, end - 1, end) + 1\n", "chat_tokens",
          "every_token_of_last_character_trains"),
    Fault("token of another turn", "data/tokens", "return bool(within.strip()) or not beyond.strip()", "return True",
          "chat_tokens", "header_that_strips_blanks_never_trains"),
    Fault("closing token dropped", "data/template", "return len(before)\n            if text",
          "return len(before) - 1\n            if text", "chat_template", "matches_trl_training_template and qwen3"),
    Fault("header missing in the prompt", "data/template", "len(prompt) + len(self.header) * missing", "len(prompt)",
          "chat_template", "tools_matches_trl_training_template"),
    Fault("reply that starts with the end of the prompt", "data/template",
          "if left_out and text.startswith(left_out[0], begin):", "if False:", "chat_template",
          "like_others_equals_exact_if_reply_begins"),
    Fault("rewritten turns in one sequence", "data/template", "if all(same(text, span, i)",
          "if all(True or same(text, span, i)", "chat_template", "reasoning_matches_trl_training_template"),
    Fault("weight 0 trains", "data/conversations", "        weight *= of_record\n", "        weight = of_record\n",
          "conversations", "weight_0_removes_turn"),
    Fault("same order in every epoch", "hosts/token_data", "default_rng((seed, epoch))", "default_rng(seed)",
          "token_data", "epochs_train_each_token_once"),
    Fault("unused channel accepted", "hosts/sft", "if name != OTHER and name not in found:", "if False:", "sft",
          "channels_missing_from_data_are_rejected"),
    Fault("token count not restored", "hosts/iterations", "getattr(checkpoint_args, TOTAL, 0)", "0",
          "checkpoints", "checkpoint_resumes_with_another_objective and nll-dft"),
    Fault("schedule one iteration late", "hosts/iterations", "self.begin(run.curr_iteration + 1)",
          "self.begin(run.curr_iteration)", "checkpoints", "schedule_starts_with_nll_and_ramps_to_objective"),
    Fault("schedule reset in evaluation", "hosts/iterations", 'getattr(get_args(), "iteration", 0)', "1",
          "checkpoints", "skip_train_restores_schedule_from_checkpoint"),
    Fault("patches not undone", "hosts/patches", "                setattr(owner, name, original)",
          "                pass", "patches", "enable_and_undo_restore_megatron"),
    # Configuration and metrics
    Fault("batch and sequence swapped, not rejected", "ops/vocab_parallel", "if target.shape != rows.shape[:-1]:",
          "if target.numel() * rows.shape[-1] != rows.numel():", "vocab_parallel", "loss_rejects_mismatched_arguments"),
    Fault("metric without mask", "metrics", "loss_mask.float() * stats.valid", "stats.valid.float()", *METRIC),
    Fault("metric of ignored tokens", "metrics", "loss_mask.float() * stats.valid", "loss_mask.float()", *METRIC),
    Fault("metric 0 x NaN", "metrics", "torch.where(weight > 0.0, torch.stack(list(columns.values())) * weight, 0.0)",
          "(torch.stack(list(columns.values())) * weight)",
          "metrics", "masked_token_adds_nothing_to_metrics"),
    Fault("count of all tokens", "metrics", "weight.sum().expand", "torch.ones_like(weight).sum().expand", *METRIC),
    Fault("host reports the objective value", "config", 'return_nll=True', 'return_nll=False',
          "config", "options_report_nll_and_pass_every_setting"),
    Fault("setting not passed on", "config", "backend=self.backend,", "",
          "config", "options_report_nll_and_pass_every_setting"),
    # Megatron-Bridge, in tests that do not need it; the others are in test_bridge_host.py
    Fault("mask of the output ignored", "hosts/binding", "                mask = others[0]\n",
          "                mask = compat.loss_mask_of(loss_func, micro_batch.inputs.loss_mask)\n", "binding",
          "report_excludes_masked_tokens_with_inf_or_nan_loss"),
    Fault("masked labels kept", "hosts/loss_head", "labels.masked_fill(masked, IGNORE_INDEX)", "labels",
          "launch_bridge", "dft_step_sets_masked_labels_to_ignore_index_in_copy"),
    Fault("valid labels ignored", "hosts/loss_head", "labels.masked_fill(masked, IGNORE_INDEX)",
          "labels.masked_fill(~masked, IGNORE_INDEX)",
          "launch_bridge", "dft_step_sets_masked_labels_to_ignore_index_in_copy"),
    Fault("batch changed in place", "hosts/loss_head", "{**batch, \"labels\": labels.masked_fill(",
          "{**batch, \"labels\": labels.masked_fill_(",
          "launch_bridge", "dft_step_sets_masked_labels_to_ignore_index_in_copy"),
    # Host layer: the objective is applied, metrics belong to their tokens
    Fault("pretrain replaced in one module only", "hosts/patches",
          "in list(_holders(original)):", "in [(owner, name)]:", "patches",
          "wrap_replaces_function_in_every_module_and_restores_it"),
    Fault("unapplied objective accepted", "launch", "            prepared.check()", "            pass", "launch",
          "(launcher_fails_if_objective_reaches_no_model or launcher_fails_on_every_rank_without_pretrain_call)"),
    Fault("loss without gradients accepted", "hosts/binding",
          " or (torch.is_grad_enabled() and not micro_batch.differentiable)",
          "", "launch",
          "(launcher_fails_if_objective_reaches_no_model or launcher_fails_on_every_rank_without_pretrain_call)"),
    Fault("model that bypasses the loss accepted", "hosts/binding",
          "    if head.inputs is not None:\n        head.reset()\n        raise",
          "    if False:\n        raise", "forward_step", "forward_step_rejects_invalid_mask_output_or_call"),
    Fault("second forward pass accepted", "hosts/loss_head", "if len(taken) > 1:", "if False:", "forward_step",
          "forward_step_rejects_invalid_mask_output_or_call"),
    Fault("first argument used as mask", "hosts/compat", "    if isinstance(bound.get(\"loss_mask\"), Tensor):",
          "    if arguments:\n        return arguments[0]\n    if False:",
          "binding", "loss_mask_of_finds_mask_by_name_or_dtype"),
    Fault("unused forward pass accepted", "hosts/megatron_lm", "            run.begin()\n",
          "            run.failure = ''\n", "launch",
          "(launcher_fails_if_objective_reaches_no_model or launcher_fails_on_every_rank_without_pretrain_call)"),
    Fault("channels missing from the labels accepted", "hosts/iterations",
          "if self.named is not None and not self.named:", "if False:",
          "launch", "channels_fail_run_if_no_label_carries_one"),
    Fault("mask of ignored tokens accepted", "hosts/loss_head",
          "if self.counted is not None and self.counted:", "if False:",
          "forward_step",
          "forward_step_rejects_invalid_mask_output_or_call"),
    Fault("legacy loss_func accepted", "hosts/compat", "if count == 1 and", "if False and", "forward_step",
          "forward_step_rejects_invalid_mask_output_or_call"),
    Fault("channels beyond their number", "labels", "channel < channels", "channel >= 0", "labels",
          "label_out_of_range_stays_out_of_range"),
    Fault("unnamed channels accepted", "hosts/binding", "        if self.config.channels:", "        if False:",
          "forward_step", "forward_step_rejects_invalid_mask_output_or_call"),
    Fault("channels with a schedule plan accepted", "hosts/compat",
          "            if needed:\n", "            if False:\n",
          "binding",
          "check_settings_rejects_channels_with_schedule_plan"),
    Fault("another loss trained", "hosts/loss_head", "if self.computed and not self.trained:", "if False:", "launch",
          "(launcher_fails_if_objective_reaches_no_model or launcher_fails_on_every_rank_without_pretrain_call)"),
    Fault("schedule plan with every label", "hosts/binding",
          'head.receive(call.arguments["labels"], call.arguments.get("loss_mask"))',
          'head.receive(call.arguments["labels"], None)', "forward_step", "schedule_plan_ignores_masked_labels"),
    Fault("MTP heads train on ignored labels", "hosts/binding",
          "if loss_mask is None and compat.has_mtp(module.config)",
          "if False", "forward_step", "mtp_excludes_ignored_labels"),
    Fault("handle removes nothing", "hosts/binding", "            self._undo.pop()()",
          "            self._undo.pop()",
          "forward_step", "install_handle_describes_and_removes_binding"),
    Fault("total of each micro-batch", "hosts/binding", "share = 1.0 / self.micro_batches()", "share = 1.0",
          "forward_step",
          "totals_are_summed_over_micro_batches"),
    Fault("fusion other than te accepted", "hosts/compat", 'and fusion != "native":', 'and fusion == "te":', "binding",
          "check_settings_rejects_incompatible_settings"),
    Fault("chunks in the dtype of autocast", "ops/linear_fused",
          "_logits(hidden, weight, columns, _buffer(hidden, [columns])) for", "hidden @ weight[columns].t() for",
          "linear_fused",
          "autocast_leaves_linear_dft_loss_unchanged"),
    Fault("q below fp32 tiny", "ops/objectives", "a < FP32.tiny:", "a == 0.0:",
          "objectives", "extreme_parameters_are_finite_in_fp32"),
    Fault("new graph name per compilation", "ops/objectives", "(self.by_value and known == self)", "False",
          "compile", "graph_name_is_shared"),
    Fault("schedule compared by value", "ops/objectives",
          "    blend: Tensor  # []\n    by_value: ClassVar[bool] = False",
          "    blend: Tensor  # []\n    by_value: ClassVar[bool] = True", "compile", "graph_name_is_shared"),
    Fault("GlobalState not passed by Bridge", "hosts/bridge", "self.__signature__ = inspect.signature(forward_step)",
          "self.__signature__ = inspect.signature(lambda data_iterator, model: None)",
          "launch_bridge", "dft_step_sets_masked_labels_to_ignore_index_in_copy"),
]
# fmt: on


def run_tests(folder: Path, files: Sequence[str], expression: str) -> None:
    """Run in a fork that has imported torch and pytest, but not megatron_dft. Exits with the status of pytest."""
    with open(folder / "output", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(folder)
    sys.path[0] = os.environ["PYTHONPATH"] = str(folder)
    sys.dont_write_bytecode = True
    tests = [f"tests/test_{name}.py" for name in files]
    code = pytest.main(["-x", "--tb=line", "-p", "no:cacheprovider", *tests, "-k", expression])
    import megatron_dft

    assert folder in Path(megatron_dft.__file__).parents, "the tests imported another copy of the library"
    os._exit(code)


def try_in_copy(fault: Fault | None, files: Sequence[str], expression: str) -> tuple[int, str]:
    """Exit status and output of the tests on a copy of the library with the fault."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        for part in ("megatron_dft", "tests", "examples"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        if fault:
            module = folder / "megatron_dft" / f"{fault.module}.py"
            text = module.read_text()
            if text.count(fault.old) != 1:
                return -1, f"the old text occurs {text.count(fault.old)} times in {module.name}"
            module.write_text(text.replace(fault.old, fault.new))
        process = FORK.Process(target=run_tests, args=(folder, files, expression))
        process.start()
        process.join()
        return process.exitcode, (folder / "output").read_text()


def try_faults(faults: Sequence[Fault]) -> None:
    """Print a line per fault; exits with the number of faults that were not caught."""
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
    parser.add_argument("-k", default="", help="only faults whose module or name contains NAME, as data/")
    wanted = parser.parse_args()
    faults = [fault for fault in FAULTS if wanted.k in f"{fault.module} {fault.name}"]
    if not faults:
        parser.error(f"no fault matches {wanted.k!r}")
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
