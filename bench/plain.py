"""The published algorithms, written plainly: what a good programmer gets who follows the papers and
their code's structure.

SparseGPT is Algorithm 1 of arXiv 2301.00774 in float32, one column at a time; Wanda is arXiv
2306.11695. The walk is that of
both papers' code: catch the first layer's inputs; then, layer by layer, pass all windows with a
hook on each linear, prune
each linear by its own statistics, pass all windows again. Batches are as large as ours, which the
papers' code does not do.
"""
import torch

from calib_prune.core import share


def plain_sparsegpt(weight: torch.Tensor,   # [d_out, d_in] float32
                    hessian: torch.Tensor,  # [d_in, d_in] float32
                    sparsity: float = 0.6, block: int = 128, damping: float = 0.01) -> torch.Tensor:
    """The pruned weight.

    A block prunes exactly so many weights that floor(sparsity × weights) are gone by its end; the
    papers' code prunes one
    more in each block.
    """
    W, H = weight.clone(), hessian.clone()
    d_out, d_in = W.shape
    dead = H.diagonal() == 0
    H[dead, dead] = 1
    W[:, dead] = 0
    H.diagonal().add_(damping * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    for i in range(0, d_in, block):
        j = min(i + block, d_in)
        W1, U1 = W[:, i:j].clone(), U[i:j, i:j]
        errors, scores = torch.zeros_like(W1), W1**2 / U1.diagonal()**2
        count = share(sparsity, d_out * j) - share(sparsity, d_out * i)
        mask = scores <= scores.flatten().sort()[0][count - 1] if count else torch.zeros_like(
            scores, dtype=torch.bool)
        for k in range(j - i):
            w = W1[:, k].clone()
            e = torch.where(mask[:, k], w, 0) / U1[k, k]
            W1[:, k:] -= e[:, None] @ U1[k:k + 1, k:]
            errors[:, k] = e
        W[:, i:j] = W1.masked_fill(mask, 0)
        W[:, j:] -= errors @ U[i:j, j:]
    return W


def plain_wanda(weight: torch.Tensor,   # [d_out, d_in] float32
                squares: torch.Tensor,  # [d_in], mean square of each input
                sparsity: float = 0.6) -> torch.Tensor:
    "The pruned weight."
    order = (weight.abs() * squares.sqrt()).sort(dim=1, stable=True)[1]
    return weight.scatter(1, order[:, :share(sparsity, weight.shape[1])], 0)


class Inputs:
    "What one linear's inputs sum up to."
    def __init__(self, method: str): self.method, self.total, self.tokens = method, 0, 0

    def __call__(self, module, args) -> None:
        x = args[0].flatten(0, -2)
        self.total = self.total + (x.T @ x if self.method == "sparsegpt" else x.square().sum(0))
        self.tokens += len(x)


class _Caught(Exception):
    "Ends a pass once the first layer was called."


def first_inputs(model, batches: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[dict]]:
    "Hidden states that enter the first layer, and its other arguments, by batch."
    hidden, others = [], []
    def catch(module, args, kwargs):
        hidden.append(args[0])
        others.append(kwargs)
        raise _Caught
    handle = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for batch in batches:
        try: model(batch, use_cache=False)
        except _Caught: pass
    handle.remove()
    return hidden, others


@torch.no_grad()
def plain_prune(model,                 # of the LLaMA family; pruned in place
                tokens: torch.Tensor,  # int64 [N, L]
                method: str = "sparsegpt", sparsity: float = 0.6, batch_tokens: int = 4096) -> None:
    "Prune every linear of every layer, sequentially."
    hidden, others = first_inputs(
        model, list(tokens.split(max(1, batch_tokens // tokens.shape[1])))
    )
    for layer in model.model.layers:
        linears = [m for m in layer.modules() if isinstance(m, torch.nn.Linear)]
        inputs = [Inputs(method) for _ in linears]
        handles = [m.register_forward_pre_hook(o) for m, o in zip(linears, inputs, strict=True)]
        for x, kwargs in zip(hidden, others, strict=True): layer(x, **kwargs)
        for o in handles: o.remove()
        for m, o in zip(linears, inputs, strict=True):
            kernel = plain_sparsegpt if method == "sparsegpt" else plain_wanda
            m.weight.copy_(kernel(m.weight, o.total / o.tokens, sparsity))
        hidden = [layer(x, **kwargs) for x, kwargs in zip(hidden, others, strict=True)]
