"""Grad-CAM of a head: MONAI's numbers, sums that give the logit, and nothing of what lies outside the scan."""

import torch
from monai.visualize import GradCAM
from torch import nn

from dagman.downstream.grad_cam import WithGradCam, grad_cam
from dagman.downstream.study_heads import LinearProbe, StudyOutput


def study(seed=0, channels=6):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, channels, 3, 4, 5, generator=generator)
    return tokens, torch.rand(2, 3, 3, 4, 5, generator=generator), torch.ones(2, 3, 4, 5, dtype=torch.bool)


class Bent(nn.Module):
    """A head that is not linear, as MONAI sees it and as ours."""

    def __init__(self):
        super().__init__()
        self.before, self.after, self.out = nn.Identity(), nn.Conv3d(6, 8, 3, padding=1), nn.Linear(8, 3)

    def forward(self, tokens, places=None, valid=None):
        logits = self.out(torch.tanh(self.after(self.before(tokens))).mean(dim=(2, 3, 4)))
        return logits if places is None else StudyOutput(logits, None)


def test_it_is_what_monai_computes():
    torch.manual_seed(1)
    head, (tokens, places, valid) = Bent(), study()
    ours = grad_cam(head, tokens, places, valid)
    assert all(parameter.grad is None for parameter in head.out.parameters())
    theirs = GradCAM(nn_module=head, target_layers="before")
    for finding in range(3):
        expected = theirs.compute_map(tokens.clone().requires_grad_(), class_idx=finding)[:, 0]
        assert torch.allclose(ours[:, finding], expected, atol=1e-6) and expected.max() > 0


def test_of_a_linear_probe_the_cells_add_up_to_the_logit():
    tokens, places, valid = study()
    valid[:, :, :, 3:] = False
    probe = LinearProbe(6, 2)
    nn.init.normal_(probe.whitening.mean)
    nn.init.normal_(probe.whitening.root)
    nn.init.normal_(probe.linear.weight)
    both = grad_cam(probe, tokens, places, valid)
    assert (both[~valid[:, None].expand_as(both)] == 0).all()
    opposite = LinearProbe(6, 2)
    opposite.load_state_dict(probe.state_dict())
    with torch.no_grad():
        opposite.linear.weight.neg_()
    whole = both - grad_cam(opposite, tokens, places, valid)  # relu(x) - relu(-x) = x
    logits = probe(tokens, places, valid).logits - probe.linear.bias
    assert torch.allclose(whole.sum(dim=(2, 3, 4)), logits, atol=1e-4)


def test_it_works_where_no_gradients_are_kept():
    probe = LinearProbe(6, 2)
    nn.init.normal_(probe.linear.weight)
    tokens, places, valid = study()
    with torch.inference_mode():
        said = WithGradCam(probe)(tokens.clone(), places, valid)
    assert torch.equal(said.maps, grad_cam(probe, tokens, places, valid)) and said.maps.max() > 0
    assert torch.equal(said.logits, probe(tokens, places, valid).logits)
