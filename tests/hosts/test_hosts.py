"""Frameworks with an optimizer switched on in their own way: the real packages, skipped where they are missing."""

import importlib
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from asgo import ASGO, Rule, presets, route
from asgo.hosts.timm import groups, register
from asgo.views import heads

HOSTS = {
    "transformers": "transformers",
    "timm": "timm",
    "lightning": "lightning",
    "torchtitan": "torchtitan.components.optimizer",
}
"""The modules of `asgo.hosts`, each with the module of its framework."""


def views_by_name(optimizer):
    return {
        name: view
        for group in optimizer.param_groups
        for name, view in zip(group["param_names"], group["views"], strict=True)
    }


def missing(name):
    return pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ImportError)


def host(name):
    """A module of `asgo.hosts`, where its framework is installed."""
    missing(HOSTS[name])
    return importlib.import_module(f"asgo.hosts.{name}")


def factory(*args, **options):
    return host("transformers").factory(*args, **options)


ALONE = """
import importlib, sys, asgo, asgo.hosts
print(*set(sys.modules) & {"transformers", "timm", "lightning", "torchtitan"})
sys.modules.update(dict.fromkeys(("transformers", "timm", "lightning", "pytorch_lightning", "torchtitan")))
for name in ("transformers", "timm", "lightning", "torchtitan"):
    try:
        module = importlib.import_module(f"asgo.hosts.{name}")
        module.register()
    except ImportError as error:
        print(error)
"""


def test_the_library_imports_no_host_and_a_host_says_what_to_install():
    """In a process in which none can be imported."""
    ended = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=True)
    said = [f'asgo.hosts.{name} needs {name}: pip install "asgo[{name}]".' for name in HOSTS]
    assert ended.stdout.splitlines() == ["", *said]


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


@pytest.mark.parametrize("inside", [False, True], ids=["options beside it", "options in it"])
def test_options_of_a_factory(tmp_path, inside):
    options = {"lr": 3e-3, "optimizer": ASGO.paper, "rules": [Rule("*q_proj.weight", None)], "per_head": True}
    optimizer = trainer(tmp_path, (factory(**options), {}) if inside else (factory, options)).create_optimizer()
    views = views_by_name(optimizer)
    assert {group["lr"] for group in optimizer.param_groups} == {3e-3}
    assert {group["statistic"] for group in optimizer.param_groups} == {"gradient"}
    assert views["model.layers.0.self_attn.q_proj.weight"] is None
    assert views["model.layers.0.self_attn.k_proj.weight"] == heads(2).to_dict()


@pytest.mark.filterwarnings("default:.*parameters without names:UserWarning")
def test_a_class_in_place_of_the_factory_warns(tmp_path):
    with pytest.warns(UserWarning, match=r"ASGO: parameters without names .* Pass asgo\.route\(model\)"):
        trainer(tmp_path, (ASGO, {"lr": 1e-2})).create_optimizer()


BARE = r"needs the model, .*; got list\. Pass the model itself, not model\.parameters\(\)\."


def test_parameters_in_place_of_a_model_are_refused():
    with pytest.raises(TypeError, match=r"asgo\.hosts\.transformers\.factory " + BARE):
        factory()([torch.nn.Parameter(torch.ones(2, 3))], lr=1e-2)


def test_an_optimizer_by_its_name():
    model = torch.nn.Linear(3, 4)
    for name in ("asgo", "DASGO", "shampoo", "adammini"):
        built = factory(model, optimizer=name, **({"lr": 1e-3} if name == "shampoo" else {}))
        assert type(built).__name__.lower() == name.lower()
    with pytest.raises(ValueError, match=r"no optimizer of asgo is called 'asog'\. Did you mean 'asgo'\? There are "):
        factory(model, optimizer="asog")
    with pytest.raises(ValueError, match=r"no optimizer of asgo is called 'muon'\. There are adablock, "):
        factory(optimizer="muon")


class Seen:
    """What a logger of the Trainer gets."""

    def __new__(cls):
        transformers = missing("transformers")

        class Callback(transformers.TrainerCallback):
            def __init__(self):
                self.logs = {}

            def on_log(self, args, state, control, logs=None, **given):
                self.logs.setdefault(state.global_step, {}).update(logs)

        return Callback()


def test_the_trainer_logs_metrics_where_its_losses_go(tmp_path, capsys):
    built = trainer(tmp_path, (factory, {"lr": 1e-2}))
    seen, callback = Seen(), host("transformers").MetricsCallback
    built.add_callback(callback(built, every=2, keys=("ratio", "failures"), parameters="*proj.weight"))
    built.add_callback(seen)
    built.train()
    names = [name for name, _ in built.model.named_parameters() if name.endswith("proj.weight")]
    assert len(names) == 7
    for step in range(1, 7):
        found = {key: value for key, value in seen.logs[step].items() if "/" in key}
        assert set(found) == ({f"{key}/{name}" for key in ("ratio", "failures") for name in names} if step % 2 == 0
                              else set())  # fmt: skip
        assert all(0 < value < 1 for key, value in found.items() if key.startswith("ratio"))
    assert not any("/" in key for entry in built.state.log_history for key in entry)
    assert "ratio" not in capsys.readouterr().out


def test_recording_changes_nothing_that_the_trainer_learns(tmp_path):
    plain, logged = (trainer(tmp_path / str(i), (factory, {"lr": 1e-2})) for i in range(2))
    logged.add_callback(host("transformers").MetricsCallback(logged))
    for each in (plain, logged):
        each.train()
    assert all(map(torch.equal, plain.model.parameters(), logged.model.parameters()))


def test_wrong_metrics_and_optimizers_are_named(tmp_path):
    callback = host("transformers").MetricsCallback
    with pytest.raises(ValueError, match=r"there is no metric 'rms'\. There are update_rms, "):
        callback(None, keys=("rms",))
    with pytest.raises(ValueError, match=r"every must be a number of steps >= 1; got 0"):
        callback(None, every=0)
    built = trainer(tmp_path, None)
    built.add_callback(callback(built))
    with pytest.raises(TypeError, match="MetricsCallback needs an optimizer of asgo; got AdamW"):
        built.train()


def test_trl_is_given_the_same_factory(tmp_path):
    trl, datasets = missing("trl"), missing("datasets")
    arguments = trl.SFTConfig(str(tmp_path), max_steps=2, report_to=[], use_cpu=True, bf16=False, max_length=8,
                              per_device_train_batch_size=2, disable_tqdm=True)  # fmt: skip
    rows = datasets.Dataset.from_list([{"input_ids": [1 + i, 2, 3, 4]} for i in range(8)])
    built = trl.SFTTrainer(llama(), arguments, train_dataset=rows, processing_class=tokenizer(),
                           optimizer_cls_and_kwargs=(factory, {"lr": 1e-2}))  # fmt: skip
    before = [param.detach().clone() for param in built.model.parameters()]
    built.train()
    assert [group["name"] for group in built.optimizer.param_groups] == ["adamw", "matrices"]
    assert not any(map(torch.equal, before, built.model.parameters()))


def tokenizer():
    """Words ``w0`` to ``w31``."""
    tokenizers, transformers = missing("tokenizers"), missing("transformers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(32)}, unk_token="w0"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")


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
            return host("lightning").configure(
                self, lr=1e-2, schedule=partial(torch.optim.lr_scheduler.StepLR, step_size=2)
            )

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


def test_lightning_logs_metrics_to_every_logger(tmp_path):
    lightning, MetricsCallback = missing("lightning"), host("lightning").MetricsCallback
    written = {}

    class Kept(lightning.pytorch.loggers.CSVLogger):
        def log_metrics(self, metrics, step=None):
            written.setdefault(step, {}).update(metrics)

    class Fit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.Linear(6, 3)

        def training_step(self, batch, index):
            return self.model(batch).square().mean()

        def configure_optimizers(self):
            return host("lightning").configure(self, optimizer="asgo", lr=1e-2)

    data = torch.utils.data.DataLoader(torch.randn(24, 6), batch_size=4)
    fit = lightning.Trainer(max_epochs=1, accelerator="cpu", logger=Kept(tmp_path), enable_progress_bar=False,
                            enable_model_summary=False, enable_checkpointing=False, accumulate_grad_batches=2,
                            callbacks=[MetricsCallback(every=2, keys=("ratio",))])  # fmt: skip
    fit.fit(Fit(), data)
    found = {step: set(row) for step, row in written.items() if any("/" in key for key in row)}
    assert found == {2: {"ratio/model.weight", "ratio/model.bias"}}


def test_lightning_is_not_given_bare_parameters():
    with pytest.raises(TypeError, match=r"asgo\.hosts\.lightning\.configure " + BARE):
        host("lightning").configure([torch.nn.Parameter(torch.ones(2, 3))])


def test_what_lightning_gets():
    configure = host("lightning").configure
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


def test_timm_is_not_given_bare_parameters():
    missing("timm")
    with pytest.raises(TypeError, match=r"asgo\.hosts\.timm\.groups " + BARE):
        groups([torch.nn.Parameter(torch.ones(2, 3))])


# ---- torchtitan ----------------------------------------------------------------------------------------------------


def titan_container(model, **options):
    titan, ours = missing("torchtitan.components.optimizer"), host("torchtitan").OptimizersContainer
    config = ours.Config(
        param_groups=[
            titan.ParamGroupConfig(pattern="bias$", optimizer_name="AdamW", optimizer_kwargs={"lr": 1e-3}),
            titan.ParamGroupConfig(pattern=".*", optimizer_name="asgo", optimizer_kwargs={"lr": 1e-2, **options}),
        ],
        implementation="for-loop",
    )
    return config.build(model_parts=[model])


def titan_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Embedding(8, 6), torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 8))


def titan_steps(model, container, start, stop):
    for step in range(start, stop):
        dice = torch.Generator().manual_seed(step)
        model(torch.randint(8, (4,), generator=dice)).square().mean().backward()
        container.step()
        container.zero_grad()


def test_torchtitan_trains_saves_and_resumes_bit_for_bit():
    model = titan_model()
    container = titan_container(model)
    assert [type(each).__name__ for each in container] == ["AdamW", "ASGO"]
    views = views_by_name(container.optimizers[1])
    assert views["0.weight"] is None
    assert views["3.weight"] is None
    assert views["1.weight"] is not None
    titan_steps(model, container, 0, 3)
    saved = {key: x.clone() if isinstance(x, torch.Tensor) else x for key, x in container.state_dict().items()}
    weights = {key: x.clone() for key, x in model.state_dict().items()}
    titan_steps(model, container, 3, 5)

    other = titan_model()
    other.load_state_dict(weights)
    resumed = titan_container(other)
    resumed.load_state_dict(saved)
    titan_steps(other, resumed, 3, 5)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_the_default_of_torchtitan_is_one_group_and_its_report_is_logged(caplog):
    missing("torchtitan.components.optimizer")
    with caplog.at_level("INFO"):
        (optimizer,) = host("torchtitan").default_asgo(lr=0.5, weight_decay=0.0).build(model_parts=[titan_model()])
    assert {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {(0.5, 0.0)}
    assert views_by_name(optimizer)["1.weight"] is not None
    assert "OneSided" in caplog.text


def test_torchtitan_says_which_names_there_are():
    ours, titan = host("torchtitan").OptimizersContainer, missing("torchtitan.components.optimizer")
    config = ours.Config(param_groups=[titan.ParamGroupConfig(pattern=".*", optimizer_name="ASG")])
    with pytest.raises(ValueError, match=r"no optimizer of asgo is called 'ASG'\. Did you mean 'asgo'\?"):
        config.build(model_parts=[titan_model()])


# ---- DeepSpeed -----------------------------------------------------------------------------------------------------

NO_COMPILER = "import deepspeed.ops; deepspeed.ops.__compatible_ops__.clear()\n"
"""Its collectives for a CPU would be compiled first."""

DEEPSPEED = """
import torch, deepspeed
from asgo import ASGO, route
deepspeed.init_distributed("gloo")
for stage in range(4):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    config = {"train_batch_size": 4, "zero_allow_untested_optimizer": True, "zero_optimization": {"stage": stage}}
    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=ASGO(route(model), lr=1e-2), config=config)
        for _ in range(3):
            engine.backward(engine(torch.ones(4, 6)).square().mean())
            engine.step()
        print("@", stage, sum(float(p.detach().sum()) for p in model.parameters()))
    except ValueError as error:
        print("@", stage, error)
"""


def test_deepspeed_steps_as_an_own_loop_and_its_flat_partitions_are_refused_by_name():
    missing("deepspeed")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    optimizer = ASGO(route(model), lr=1e-2)
    for _ in range(3):
        model(torch.ones(4, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    ended = alone_on_gloo(NO_COMPILER + DEEPSPEED)
    said = dict(re.findall(r"^@ (\d) (.*)$", ended.stdout, re.MULTILINE))
    assert list(said) == ["0", "1", "2", "3"], ended.stderr
    total = sum(float(p.detach().sum()) for p in model.parameters())
    assert math.isclose(float(said["0"]), total, rel_tol=1e-6)
    for stage in "123":
        assert "its parameters were flattened" in said[stage]
        assert "in place of FSDP1 or DeepSpeed's ZeRO" in said[stage]


def alone_on_gloo(code):
    """A program in a process of its own, the only one of a run on the CPU."""
    port = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29671", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    environment = {**os.environ, **port, "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


# ---- the page "Switch it on" ---------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs/hosts.md").read_text()
SCRIPTS = dict(re.findall(r'^```py title="(\w+)"\n(.*?)^```$', PAGE, re.MULTILINE | re.DOTALL))


def test_the_page_has_a_script_for_every_extra_of_a_host():
    """That of the Trainer is run with the page's other code."""
    assert set(SCRIPTS) == {"trl", "accelerate", "peft", "lightning", "timm", "torchtitan", "deepspeed", "ddp"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_scripts_of_the_page_run(tmp_path, monkeypatch, name):
    for needed in ("torch" if name == "ddp" else name, *(["transformers"] if name in ("trl", "peft") else [])):
        missing(needed)
    monkeypatch.chdir(tmp_path)
    if name in ("trl", "peft"):
        llama().save_pretrained("my-model")
        tokenizer().save_pretrained("my-model")
    if name == "ddp":
        Path("train.py").write_text(SCRIPTS[name])
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py"]
        ended = subprocess.run(run, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
    elif name == "deepspeed":
        ended = alone_on_gloo(NO_COMPILER + SCRIPTS[name])
        assert ended.returncode == 0, ended.stderr
    else:
        exec(compile(SCRIPTS[name], f"hosts.md, {name}", "exec"), {"__name__": name})
