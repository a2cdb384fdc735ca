"""A Hugging Face Accelerate script, as `accelerate launch` would run it; the lines that ask the context are marked.

One thing it must leave out: `accelerator.end_training()`, which ends the process group, and here the group lives on.
"""

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from bigray.training.context import LoopContext


def train(context: LoopContext) -> None:  # context
    AcceleratorState._reset_state(reset_partial_state=True)  # a worker trains many trials, Accelerate expects one
    accelerator = Accelerator(
        cpu=context.device.type == "cpu",  # context
        gradient_accumulation_steps=2,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),  # the order is a function of the epoch
    )
    model = context.build_model()  # context
    optimizer = torch.optim.AdamW(model.parameters(), lr=context.spec.lr)  # context
    rows = TensorDataset(torch.tensor(context.data.x_train), torch.tensor(context.data.y_train))  # context
    loader = DataLoader(rows, batch_size=context.params["rows_per_pass"], shuffle=True)  # context
    saved = context.restore()  # context
    if saved is not None:
        model.load_state_dict(saved.model)
        optimizer.load_state_dict(saved.extra["optimizer"])
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    for epoch in context.remaining_epochs:  # context
        model.train()
        loader.set_epoch(epoch)
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(functional.cross_entropy(model(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        plain = accelerator.unwrap_model(model)
        context.report(validate(context, plain), epoch=epoch, model=plain)  # context
        context.save(epoch=epoch, model=plain, optimizer=optimizer)  # context
        if context.should_stop():  # context
            return


def validate(context: LoopContext, model: torch.nn.Module) -> dict[str, float]:
    model.eval()
    x, y = torch.tensor(context.data.x_val), torch.tensor(context.data.y_val)
    with torch.inference_mode():
        outputs = model(x.to(context.device)).cpu()
    accuracy = (outputs.argmax(dim=1) == y).double().mean()
    return {"val_accuracy": float(accuracy), "val_loss": float(functional.cross_entropy(outputs, y))}
