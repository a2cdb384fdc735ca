"""A plain PyTorch loop. The lines with `context` are all that bigray asks for."""

import torch
from torch.nn import functional

from bigray.training.context import LoopContext


def train(context: LoopContext) -> None:
    module = context.build_model()
    saved = context.restore()
    if saved is not None:
        module.load_state_dict(saved.model)
    network = context.prepare(module)  # DDP where there are several workers
    momentum = context.params["momentum"]
    optimizer = torch.optim.SGD(network.parameters(), lr=context.spec.lr, momentum=momentum, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=context.spec.epochs)
    if saved is not None:
        optimizer.load_state_dict(saved.extra["optimizer"])
        schedule.load_state_dict(saved.extra["schedule"])

    for epoch in context.remaining_epochs:
        network.train()
        for x, y in context.batches(epoch):
            optimizer.zero_grad()
            context.mean(functional.cross_entropy(network(x), y, reduction="none")).backward()
            optimizer.step()
        schedule.step()
        context.report(validate(context, module), epoch=epoch, model=module)
        if context.should_stop() or context.save_is_due or epoch == context.epochs:
            context.save(epoch=epoch, model=module, optimizer=optimizer, schedule=schedule)
        if context.is_stopping:
            return


def validate(context: LoopContext, module: torch.nn.Module) -> dict[str, float]:
    module.eval()
    x, y = torch.tensor(context.data.x_val), torch.tensor(context.data.y_val)
    with torch.inference_mode():
        outputs = module(x.to(context.device)).cpu()
    wrong = (outputs.argmax(dim=1) != y).double().mean()
    return {"val_error": float(wrong), "val_loss": float(functional.cross_entropy(outputs, y))}
