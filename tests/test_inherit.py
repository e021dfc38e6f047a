"""First weights from the teacher: exact where what is left out was dead, and only where layers correspond."""

import dataclasses

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from fastnnunet.distill.check import check_job
from fastnnunet.distill.configure import configure
from fastnnunet.distill.train import train_student
from fastnnunet.nnunet.files.checkpoint import load_checkpoint
from fastnnunet.nnunet.student.inherit import inherit, inherit_weights, read_layers
from fastnnunet.specs.distill import DistillSpec
from tests.teachers import start_weights_of
from tests.test_distill_seeds import make_job, trained
from tests.tiny import CONFIGURATION, DATASET

KINDS = ("plain 3d", "residual 3d", "plain 2d", "residual 2d")


def network(kind, features, seed=0, heads=3, **changes):
    """A U-Net of three stages built by nnU-Net, with weights that no two channels share."""
    residual, dims = kind.startswith("residual"), int(kind[-2])
    name = "ResidualEncoderUNet" if residual else "PlainConvUNet"
    kwargs = {
        "n_stages": 3,
        "features_per_stage": list(features),
        "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
        "kernel_sizes": [[3] * dims] * 3,
        "strides": [[1] * dims, [2] * dims, [2] * dims],
        ("n_blocks_per_stage" if residual else "n_conv_per_stage"): [1, 2, 2],
        "n_conv_per_stage_decoder": [2, 1],
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
        **changes,
    }
    torch.manual_seed(seed)
    made = get_network_from_plans(
        f"dynamic_network_architectures.architectures.unet.{name}",
        kwargs,
        ["conv_op", "norm_op", "nonlin"],
        2,
        heads,
        deep_supervision=True,
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made.eval()


def kill(teacher, widths):
    """Let all but `widths` channels of each space, drawn at random, be written and read by nothing."""
    weights, generator = dict(teacher.named_parameters()), torch.Generator().manual_seed(7)
    alive = {}
    layers = read_layers(teacher.state_dict())
    for layer in layers:
        total = weights[f"{layer.name}.weight"].shape[1 if layer.transposed else 0]
        if layer.writes[0] != "heads" and layer.writes not in alive:
            kept = torch.randperm(total, generator=generator)[: widths[total]]
            alive[layer.writes] = torch.zeros(total, dtype=torch.bool).scatter_(0, kept, True)
    with torch.no_grad():
        for layer in layers:
            if layer.writes in alive:
                dead = ~alive[layer.writes]
                for name in (layer.norm, layer.name):
                    if name is not None:
                        axis = 1 if layer.transposed and name == layer.name else 0
                        weights[f"{name}.weight"].transpose(0, axis)[dead] = 0
                        if f"{name}.bias" in weights:
                            weights[f"{name}.bias"][dead] = 0
            read = [alive.get(space, torch.ones(2, dtype=torch.bool)) for space in layer.reads]
            weights[f"{layer.name}.weight"].transpose(0, 0 if layer.transposed else 1)[~torch.cat(read)] = 0


@pytest.mark.parametrize("kind", KINDS)
def test_leaving_out_dead_channels_changes_nothing(kind):
    teacher, student = network(kind, (8, 12, 16)), network(kind, (4, 6, 8), seed=1)
    kill(teacher, {8: 4, 12: 6, 16: 8})
    assert inherit_weights(student, teacher.state_dict()) == 1
    image = torch.randn(2, 2, *[16] * int(kind[-2]), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        for ours, theirs in zip(student(image), teacher(image), strict=True):
            assert theirs.std() > 0.1
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_all_channels_are_the_teacher(kind):
    teacher, student = network(kind, (4, 6, 8)), network(kind, (4, 6, 8), seed=1)
    assert inherit_weights(student, teacher.state_dict()) == 1
    for name, tensor in teacher.state_dict().items():
        torch.testing.assert_close(student.state_dict()[name], tensor, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_batch_norm_takes_over_all(kind):
    """With batch norm in the place of instance norm, whose convolutions have no bias; of one image both are one."""
    norm = f"torch.nn.modules.batchnorm.BatchNorm{kind[-2]}d"
    teacher = network(kind, (4, 6, 8))
    student = network(kind, (4, 6, 8), seed=1, norm_op=norm, conv_bias=False)
    with torch.no_grad():
        for layer in teacher.decoder.transpconvs:
            layer.bias.zero_()
    assert inherit_weights(student, teacher.state_dict()) == 1
    image = torch.randn(1, 2, *[16] * int(kind[-2]), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for ours, theirs in zip(student.train()(image), teacher(image), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_importance_by_hand():
    """One stage boundary: of four channels those with the largest |factor| times size of the weights that read them."""
    teacher = network("plain 2d", (4, 6, 8)).state_dict()
    name = "encoder.stages.1.0.convs"
    factors, reads = torch.tensor([3.0, -2.0, 0.5, 1, 1, 1]), torch.tensor([0.1, 2.0, 4.0, 1.5, 0.2, 1.0])
    teacher[f"{name}.0.norm.weight"] = factors  # products 0.3 4 2 1.5 0.2 1
    weight = torch.zeros(6, 6, 3, 3)
    weight[:, :, 1, 1] = reads
    teacher[f"{name}.1.conv.weight"] = weight
    taken = inherit(teacher, network("plain 2d", (4, 3, 8), seed=1).state_dict())
    torch.testing.assert_close(taken[f"{name}.0.norm.weight"], factors[[1, 2, 3]])
    torch.testing.assert_close(taken[f"{name}.1.conv.weight"].sum((2, 3)), reads[[1, 2, 3]].expand(3, 3))


def test_layers_that_do_not_correspond_keep_their_own_start():
    teacher = network("plain 3d", (8, 12, 16))
    thin = network("plain 3d", (4, 6, 8), seed=1, kernel_sizes=[[1, 3, 3], [3, 3, 3], [3, 3, 3]])
    before = {name: tensor.clone() for name, tensor in thin.state_dict().items()}
    share = inherit_weights(thin, teacher.state_dict())
    assert 0.5 < share < 1
    after = thin.state_dict()
    first, second = (f"encoder.stages.{s}.0.convs.0.conv.weight" for s in (0, 1))
    assert torch.equal(after[first], before[first])
    assert not torch.equal(after[second], before[second])
    residual = network("residual 3d", (4, 6, 8), seed=1)
    own = residual.state_dict()
    for name in inherit(teacher.state_dict(), own):
        assert name.startswith("decoder."), "the encoders have nothing in common"
    other = {"any.weight": torch.ones(1)}
    assert inherit(other, own) == inherit(teacher.state_dict(), other) == {}


def fresh(job):
    plans, dataset_json, _ = check_job(job, resume=False, overwrite=True)
    torch.manual_seed(job.distill.seed)
    return configure(job, plans, dataset_json, None, False, "cpu", start_weights_of(job)).network.state_dict()


class TestTraining:
    def test_start(self, world):
        """The first weights of a training; `random` is nnU-Net's own start, whatever the teacher."""
        teacher = world / "results" / DATASET / f"nnUNetTrainer__nnUNetPlans__{CONFIGURATION}"
        weights = [load_checkpoint(teacher / f"fold_{n}" / "checkpoint_final.pth")["network_weights"] for n in (0, 1)]
        job = make_job()
        first = fresh(job)
        taken = inherit(weights[0], first)
        assert len(taken) > 15
        for name, tensor in taken.items():
            torch.testing.assert_close(first[name], tensor, msg=name)
        random = fresh(dataclasses.replace(job, distill=dataclasses.replace(job.distill, start="random")))
        assert any(not torch.equal(random[name], first[name]) for name in taken)
        both = dataclasses.replace(job, teacher=dataclasses.replace(job.teacher, folds=(0, 1)), fold=1)
        of_its_fold = inherit(weights[1], first)
        second = fresh(both)
        assert all(torch.equal(second[name], tensor) for name, tensor in of_its_fold.items())

    def test_given_weights_win(self, world, tmp_path):
        job = make_job(start="random", epochs=1)
        given = train_student(job, validate=False) / "checkpoint_final.pth"
        started = fresh(dataclasses.replace(make_job(), pretrained=given))
        for name, tensor in load_checkpoint(given)["network_weights"].items():
            if ".seg_layers." not in name:
                assert torch.equal(started[name], tensor), name

    def test_in_the_name_of_the_run(self):
        assert DistillSpec().tag == "a0.5_T1"
        assert DistillSpec(start="random", loss="kl").tag == "a0.5_T1_fromscratch_kl"

    def test_compiled_networks_store_plain_names(self, world, monkeypatch):
        """On GPUs nnU-Net compiles the network; stock nnU-Net loads the checkpoint, and the run goes on from it."""
        job = make_job(epochs=2)
        reference = trained(job)
        monkeypatch.setattr(nnUNetTrainer, "_do_i_compile", lambda self: True)
        compiled = []

        def compile_eagerly(module, **_):
            compiled.append(module)
            return OptimizedModule(module)

        class OptimizedModule(torch.nn.Module):
            """What torch.compile returns, as far as names go."""

            def __init__(self, module):
                super().__init__()
                self._orig_mod = module

            def forward(self, *args, **kwargs):
                return self._orig_mod(*args, **kwargs)

            def __getattr__(self, name):
                try:
                    return super().__getattr__(name)
                except AttributeError:
                    return getattr(super().__getattr__("_orig_mod"), name)

        monkeypatch.setattr(torch, "compile", compile_eagerly)

        class KilledError(Exception):
            pass

        def kill(state):
            if state.epoch == 1:
                raise KilledError

        with pytest.raises(KilledError):
            train_student(job, overwrite=True, validate=False, progress=kill)
        resumed = trained(job, resume=True)
        assert compiled
        assert resumed["network_weights"].keys() == reference["network_weights"].keys()
        for name, tensor in reference["network_weights"].items():
            np.testing.assert_array_equal(resumed["network_weights"][name], tensor, err_msg=name)


def test_sizes_that_are_wider_keep_their_own_start():
    teacher, wide = network("plain 2d", (4, 6, 8)), network("plain 2d", (8, 12, 16), seed=1)
    assert inherit_weights(wide, teacher.state_dict()) == 0
