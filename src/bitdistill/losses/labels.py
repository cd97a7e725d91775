"""Log-likelihoods of a task's label words, to distil labels alone (paper, sec. 3.3; larger teachers, Fig. 3c).

    s_c  = sum over the tokens of label word c of log softmax(z)[token]
    L_LD = KL( softmax(t / tau) || softmax(s / tau) ) over the C labels      (losses/logits.py, with s for logits)

t and s are the teacher's and the student's, each with its own tokenizer, so vocabularies need not be equal. At tau = 1
these are the distributions that prediction uses (eval/classify.py). Where all words have one token, the norm of log
softmax cancels: L_LD is then LD (Eq. 10, 11) with logits of the labels' tokens alone.

Shape legend: B rows, P positions whose next token is scored, S scored tokens, C labels, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor


def label_log_likelihoods(
    logits_BPV: Tensor, position_S: Tensor, token_S: Tensor, member_SC: Tensor
) -> Tensor:
    """Summed log-likelihood in nats of each label word's tokens: float32 [B, C], differentiable.

    Args:
        logits_BPV: any float dtype.
        position_S, token_S: int64: token `token_S[s]` is scored by the logits at `position_S[s]`; no pair comes twice.
        member_SC: bool: whether the token is one of the label word's.

    Raises:
        ValueError: shapes do not fit one another.
    """
    if logits_BPV.ndim != 3 or not len(position_S) == len(token_S) == len(member_SC):
        raise ValueError(
            f"logits {tuple(logits_BPV.shape)} (B, P, V are needed), {len(position_S)} positions, "
            f"{len(token_S)} tokens, {len(member_SC)} rows of members"
        )
    logits = logits_BPV.float()
    picked_BS = logits.flatten(1).index_select(1, position_S * logits.shape[-1] + token_S)
    log_probs_BS = picked_BS - logits.logsumexp(-1).index_select(1, position_S)
    # No matrix product, which autocast would round to bfloat16
    return (log_probs_BS[:, :, None] * member_SC).sum(1)
