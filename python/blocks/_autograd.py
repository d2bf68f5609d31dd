"""Operations that PyTorch differentiates; imported only where a tensor asks for it."""

import torch


class _Recorded(torch.autograd.Function):
    """run() gives the results and what its backward needs; backward(kept, dout) the gradients."""

    @staticmethod
    def forward(ctx, run, backward, *tensors):
        results, kept = run()
        ctx.backward_of = backward
        ctx.kept = kept
        ctx.types = [t.dtype for t in tensors]
        ctx.mark_non_differentiable(*results[1:])
        return results if len(results) > 1 else results[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, *ignored):
        gradients = ctx.backward_of(ctx.kept, dout)
        return None, None, *(g.to(dtype) for g, dtype in zip(gradients, ctx.types))


def wanted(tensors):
    """Whether one of the tensors wants a gradient."""
    return torch.is_grad_enabled() and any(getattr(t, "requires_grad", False) for t in tensors)


def recorded(run, backward, tensors):
    """The results of run() on the tensors, recorded."""
    return _Recorded.apply(run, backward, *tensors)
