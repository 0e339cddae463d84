"""Frameworks with an optimizer switched on in their own way: the real packages, skipped where they are missing."""

import subprocess
import sys
from functools import partial

import pytest
import torch

from asgo import ASGO, Rule, presets, route
from asgo.hosts.lightning import configure
from asgo.hosts.timm import groups, register
from asgo.hosts.transformers import factory
from asgo.views import heads

HOSTS = ("transformers", "timm", "lightning")


def views_by_name(optimizer):
    return {
        name: view
        for group in optimizer.param_groups
        for name, view in zip(group["param_names"], group["views"], strict=True)
    }


def missing(name):
    return pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ImportError)


def test_no_host_is_imported_before_a_function_is_called():
    code = "import sys, asgo, asgo.hosts.transformers, asgo.hosts.timm, asgo.hosts.lightning; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "asgo.hosts.timm" in loaded
    assert not set(HOSTS) & set(loaded)


# ---- the Hugging Face Trainer --------------------------------------------------------------------------------


def llama():
    transformers = missing("transformers")
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


class Counting(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, i):
        tokens = (torch.arange(12) + 5 * i) % 32
        return {"input_ids": tokens, "labels": tokens}


def trainer(folder, switched_on, model=None):
    transformers = missing("transformers")
    missing("accelerate")
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=4, save_steps=3, report_to=[], use_cpu=True,
        logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    return transformers.Trainer(
        model or llama(), arguments, train_dataset=Counting(), optimizer_cls_and_kwargs=switched_on
    )


def test_the_trainer_trains_saves_and_resumes_bit_for_bit(tmp_path):
    switched_on = (factory, {"lr": 1e-2})
    first = trainer(tmp_path, switched_on)
    first.train()
    losses = [entry["loss"] for entry in first.state.log_history if "loss" in entry]
    assert len(losses) == 6
    assert losses[-1] < losses[0]

    second = trainer(tmp_path, switched_on)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert second.state.global_step == 6
    for (name, a), b in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert losses[3:] == [entry["loss"] for entry in second.state.log_history if "loss" in entry][3:]
    for a, b in zip(first.optimizer.optimizer.state.values(), second.optimizer.optimizer.state.values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_trainer_steps_as_an_own_loop_does(tmp_path):
    """The Trainer's batches, schedule and clipping, with the optimizer built by hand."""
    transformers = missing("transformers")
    model = llama()
    optimizer = ASGO(route(model), lr=1e-2)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, 6)
    by_hand = trainer(tmp_path / "a", None, model)
    by_hand.optimizer, by_hand.lr_scheduler = optimizer, schedule
    by_hand.train()
    built = trainer(tmp_path / "b", (factory, {"lr": 1e-2}))
    built.train()
    assert all(map(torch.equal, model.parameters(), built.model.parameters()))


def test_groups_and_parameters_keep_their_names(tmp_path):
    optimizer = trainer(tmp_path, (factory, {"lr": 1e-2})).create_optimizer()
    assert type(optimizer) is ASGO
    assert [group["name"] for group in optimizer.param_groups] == ["adamw", "matrices"]
    views = views_by_name(optimizer)
    assert views["model.embed_tokens.weight"] is None
    assert views["lm_head.weight"] is None
    assert views["model.layers.0.mlp.up_proj.weight"] is not None


@pytest.mark.parametrize(
    "switched_on",
    [
        (factory, {"lr": 3e-3, "optimizer": ASGO.paper, "rules": [Rule("*q_proj.weight", None)], "per_head": True}),
        (factory(lr=3e-3, optimizer=ASGO.paper, rules=[Rule("*q_proj.weight", None)], per_head=True), {}),
    ],
    ids=["options beside it", "options in it"],
)
def test_options_of_a_factory(tmp_path, switched_on):
    optimizer = trainer(tmp_path, switched_on).create_optimizer()
    views = views_by_name(optimizer)
    assert {group["lr"] for group in optimizer.param_groups} == {3e-3}
    assert {group["statistic"] for group in optimizer.param_groups} == {"gradient"}
    assert views["model.layers.0.self_attn.q_proj.weight"] is None
    assert views["model.layers.0.self_attn.k_proj.weight"] == heads(2).to_dict()


@pytest.mark.filterwarnings("default:.*parameters without names:UserWarning")
def test_a_class_in_place_of_the_factory_warns(tmp_path):
    with pytest.warns(UserWarning, match=r"ASGO: parameters without names .* Pass asgo\.route\(model\)"):
        trainer(tmp_path, (ASGO, {"lr": 1e-2})).create_optimizer()


def test_parameters_in_place_of_a_model_are_refused():
    with pytest.raises(TypeError, match=r"route needs a torch\.nn\.Module; got list"):
        factory()([torch.nn.Parameter(torch.ones(2, 3))], lr=1e-2)


# ---- Lightning -----------------------------------------------------------------------------------------------


def test_lightning_trains_saves_and_resumes_bit_for_bit(tmp_path):
    lightning = missing("lightning")

    class Fit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))

        def training_step(self, batch, index):
            return torch.nn.functional.mse_loss(self.model(batch), batch[:, :3].sin())

        def configure_optimizers(self):
            return configure(self, lr=1e-2, schedule=partial(torch.optim.lr_scheduler.StepLR, step_size=2))

    data = torch.utils.data.DataLoader(torch.randn(24, 6, generator=torch.Generator().manual_seed(1)), batch_size=8)
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": tmp_path,
    }
    half, straight, resumed = Fit(), Fit(), Fit()
    first = lightning.Trainer(max_epochs=1, **quiet)
    first.fit(half, data)
    first.save_checkpoint(tmp_path / "half.ckpt")
    lightning.Trainer(max_epochs=2, **quiet).fit(straight, data)
    last = lightning.Trainer(max_epochs=2, **quiet)
    last.fit(resumed, data, ckpt_path=str(tmp_path / "half.ckpt"))
    assert last.global_step == 6
    assert all(map(torch.equal, straight.parameters(), resumed.parameters()))
    optimizer = last.optimizers[0]
    assert [group["name"] for group in optimizer.param_groups] == ["matrices", "adamw"]
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(1e-5)] * 2


def test_what_lightning_gets():
    model = torch.nn.Linear(4, 3)
    assert list(configure(model)) == ["optimizer"]
    made = configure(model, schedule=partial(torch.optim.lr_scheduler.StepLR, step_size=2))
    assert made["lr_scheduler"]["interval"] == "step"
    assert made["lr_scheduler"]["scheduler"].optimizer is made["optimizer"]


# ---- timm ----------------------------------------------------------------------------------------------------


def vit():
    timm = missing("timm")
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10, depth=2)


def test_timm_makes_and_steps_every_optimizer_by_name():
    optim = missing("timm.optim")
    model, data = vit(), torch.randn(2, 3, 32, 32)
    names = register()
    assert set(names) == {name.lower() for name in presets.__all__} - {"adagram", "bag", "spam"}
    for name in names:
        optimizer = optim.create_optimizer_v2(model, name, lr=1e-3, param_group_fn=groups)
        before = model.blocks[0].mlp.fc1.weight.clone()
        model(data).square().sum().backward()
        optimizer.step()
        assert type(optimizer).__name__.lower() == name
        assert not torch.equal(before, model.blocks[0].mlp.fc1.weight)


def test_timm_groups_are_its_own_with_names_and_views():
    optim = missing("timm.optim")
    register()
    model = vit()
    own = optim.param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.75)
    by_layer = partial(groups, weight_decay=0.05, layer_decay=0.75)
    optimizer = optim.create_optimizer_v2(model, "asgo", lr=1e-3, param_group_fn=by_layer)
    for theirs, ours in zip(own, optimizer.param_groups, strict=True):
        assert all(map(torch.equal, theirs["params"], ours["params"]))
        assert (theirs["lr_scale"], theirs["weight_decay"]) == (ours["lr_scale"], ours["weight_decay"])
    expected = {name: view for group in route(model) for (name, _), view in
                zip(group["params"], group["views"], strict=True)}  # fmt: skip
    assert views_by_name(optimizer) == expected


@pytest.mark.filterwarnings("default:.*parameters without names:UserWarning")
def test_fallbacks_of_timm_are_for_adamw():
    optim = missing("timm.optim")
    register()
    model = vit()
    optimizer = optim.create_optimizer_v2(model, "asgo", lr=1e-3, weight_decay=0.05, fallback_list=["head.weight"])
    views = {p: v for group in optimizer.param_groups for p, v in zip(group["params"], group["views"], strict=True)}
    assert views[model.head.weight] is None
    assert views[model.blocks[0].mlp.fc1.weight] is not None


def test_without_timm_register_says_what_is_missing():
    try:
        import timm  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="timm"):
            register()
    else:
        pytest.skip("timm is installed")
