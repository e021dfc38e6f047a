"""A temperature in the last layer of a network."""

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet

from fastnnunet.nnunet.files.checkpoint import load_checkpoint
from fastnnunet.nnunet.student.tempered import copy_tempered, tempered


def network(kind, deep_supervision):
    torch.manual_seed(0)
    blocks = {"n_conv_per_stage": 1} if kind is PlainConvUNet else {"n_blocks_per_stage": 1}
    return kind(
        input_channels=1,
        n_stages=12,  # two digits in the names of heads
        features_per_stage=[4] * 12,
        conv_op=torch.nn.Conv2d,
        kernel_sizes=3,
        strides=[1, 2, 2] + [1] * 9,
        num_classes=3,
        n_conv_per_stage_decoder=1,
        norm_op=torch.nn.InstanceNorm2d,
        nonlin=torch.nn.LeakyReLU,
        deep_supervision=deep_supervision,
        **blocks,
    ).eval()


@pytest.mark.parametrize("kind", [PlainConvUNet, ResidualEncoderUNet])
def test_only_the_output_at_full_resolution_is_divided(kind):
    net = network(kind, True)
    image = torch.randn(1, 1, 32, 32)
    before = net(image)
    net.load_state_dict(tempered(net.state_dict(), 2.5))
    after = net(image)
    torch.testing.assert_close(after[0], before[0] / 2.5)
    for a, b in zip(after[1:], before[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_what_has_no_such_head_stays_as_it_is(tmp_path):
    weights = {"up.weight": torch.ones(2)}
    assert tempered(weights, 2.0) is weights
    weights = {"decoder.seg_layers.0.weight": torch.ones(2)}
    assert tempered(weights, 1) is weights
    stored = {"network_weights": weights, "init_args": {"configuration": "2d"}, "trainer_name": "nnUNetTrainer"}
    torch.save(stored, tmp_path / "a.pth")
    copy_tempered(tmp_path / "a.pth", tmp_path / "b.pth", 1.0)
    assert (tmp_path / "b.pth").read_bytes() == (tmp_path / "a.pth").read_bytes()
    copy_tempered(tmp_path / "a.pth", tmp_path / "c.pth", 4.0)
    read = load_checkpoint(tmp_path / "c.pth")
    assert read["network_weights"]["decoder.seg_layers.0.weight"].tolist() == [0.25, 0.25]
    assert read["fastnnunet"] == {"folded_temperature": 4.0}
