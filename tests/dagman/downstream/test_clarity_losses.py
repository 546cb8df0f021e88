"""CLARiTy's losses: each against its formula in plain loops, and what padding and unsaid labels may not do."""

import math

import pytest
import torch

from dagman.downstream.clarity_losses import (
    ClarityWeights,
    clarity_losses,
    foreground_loss,
    label_loss,
    orthogonal,
    outside,
    token_contrast,
)
from dagman.downstream.studies import StudyBatch
from dagman.downstream.study_heads import StudyOutput
from spade3d.faults import UsageFault

NAN = math.nan
LABELS = torch.tensor([[1.0, 0.0, NAN], [0.0, NAN, 1.0]])
GRID = (2, 3, 2)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def entropy(logit, target):
    return -target * math.log(sigmoid(logit)) - (1 - target) * math.log(1 - sigmoid(logit))


def cells(tensor, b, f):
    """The values of a map of one study and finding, cell by cell."""
    return tensor[b, f].flatten().tolist()


@pytest.fixture
def allowed():
    """Shares of cells, some of them between 0 and 1; the second finding of the first study may be anywhere."""
    shares = torch.randint(0, 3, (2, 3, *GRID), generator=torch.Generator().manual_seed(5)) / 2
    shares[0, 1] = 1.0
    return shares


@pytest.fixture
def valid():
    return torch.rand(2, *GRID, generator=torch.Generator().manual_seed(4)) > 0.3


def test_label_loss_is_the_mean_cross_entropy_of_the_labels_that_are_said():
    logits = normal(2, 3)
    said = [(0, 0), (0, 1), (1, 0), (1, 2)]
    expected = sum(entropy(logits[b, f].item(), LABELS[b, f].item()) for b, f in said) / 4
    assert label_loss(logits, LABELS).item() == pytest.approx(expected, abs=1e-6)


def test_what_is_not_said_gives_no_gradient_and_nothing_said_gives_zero():
    logits = normal(2, 3).requires_grad_()
    label_loss(logits, LABELS).backward()
    assert logits.grad[0, 2] == 0 and logits.grad[1, 1] == 0 and (logits.grad != 0).sum() == 4
    assert label_loss(logits, torch.full((2, 3), NAN)) == 0


def test_orthogonal_is_the_mean_square_of_the_cosines_between_tokens():
    tokens = normal(2, 4, 5)
    squares = []
    for study in tokens.tolist():
        for i in range(4):
            for j in range(4):
                if i != j:
                    dot = sum(a * b for a, b in zip(study[i], study[j], strict=True))
                    squares.append(dot**2 / (sum(a * a for a in study[i]) * sum(b * b for b in study[j])))
    assert orthogonal(tokens).item() == pytest.approx(sum(squares) / len(squares), abs=1e-6)


def test_orthogonal_knows_its_ends():
    assert orthogonal(torch.eye(4)[None] * 3).item() == pytest.approx(0)
    assert orthogonal(torch.ones(1, 4, 5)).item() == pytest.approx(1)
    assert orthogonal(normal(2, 1, 5)) == 0  # one finding has no other


def test_tokens_that_follow_the_orthogonal_loss_become_orthogonal():
    tokens = (torch.ones(1, 4, 6) + 0.1 * normal(1, 4, 6)).requires_grad_()
    optimiser = torch.optim.SGD([tokens], lr=2.0)
    for _ in range(200):
        optimiser.zero_grad()
        loss = orthogonal(tokens)
        loss.backward()
        optimiser.step()
    assert loss < 1e-3


def test_token_contrast_is_the_entropy_of_matching_oneself_over_findings_that_are_present():
    tokens, terms = normal(2, 3, 5), []
    for b, f in [(0, 0), (1, 2)]:
        own = torch.nn.functional.cosine_similarity(tokens[b, f][None], tokens[b], dim=-1).tolist()
        terms.append(-own[f] + math.log(sum(map(math.exp, own))))
    assert token_contrast(tokens, LABELS).item() == pytest.approx(sum(terms) / 2, abs=1e-6)


def test_foreground_is_cross_entropy_and_dice_over_valid_cells(allowed, valid):
    logits, terms = normal(2, 3, *GRID, seed=1), []
    for b in range(2):
        for f in range(3):
            inside = [
                (logit, share)
                for logit, share, ok in zip(
                    cells(logits, b, f), cells(allowed, b, f), valid[b].flatten().tolist(), strict=True
                )
                if ok
            ]
            if all(share == 1 for _, share in inside):
                continue  # it may be anywhere: nothing is told of a place
            both = sum(sigmoid(logit) * share for logit, share in inside)
            sums = sum(sigmoid(logit) + share for logit, share in inside)
            dice = (2 * both + 1) / (sums + 1)
            terms.append(sum(entropy(*pair) for pair in inside) / len(inside) + 1 - dice)
    assert len(terms) == 5
    assert foreground_loss(logits, allowed, valid).item() == pytest.approx(sum(terms) / 5, abs=1e-5)


def test_outside_is_axialnets_entropy_where_a_finding_may_not_be_and_everywhere_where_it_is_absent(allowed, valid):
    maps, total, weight = normal(2, 3, *GRID, seed=2), 0.0, 0.0
    for b in range(2):
        for f in range(3):
            triples = zip(cells(maps, b, f), cells(allowed, b, f), valid[b].flatten().tolist(), strict=True)
            for logit, share, ok in triples:
                forbidden = (1.0 if LABELS[b, f] == 0 else 1 - share) * ok
                total, weight = total + forbidden * entropy(logit, 0.0), weight + forbidden
    assert outside(maps, allowed, LABELS, valid).item() == pytest.approx(total / weight, abs=1e-5)


def test_a_present_finding_is_free_inside_and_an_absent_one_nowhere(allowed, valid):
    maps = normal(2, 3, *GRID).requires_grad_()
    outside(maps, allowed, LABELS, valid).backward()
    free = (allowed == 1) & (LABELS != 0)[..., None, None, None]
    assert (maps.grad[free] == 0).all() and (maps.grad[:, :, ~valid.all(0)] >= 0).all()
    assert (maps.grad[1, 0][valid[1]] > 0).all()  # absent


@pytest.mark.parametrize("loss", ["foreground", "outside"])
def test_padding_learns_nothing(loss, allowed, valid):
    maps = normal(2, 3, *GRID).requires_grad_()
    if loss == "foreground":
        foreground_loss(maps, allowed, valid).backward()
    else:
        outside(maps, allowed, LABELS, valid).backward()
    hidden = ~valid[:, None].expand_as(maps)
    assert (maps.grad[hidden] == 0).all() and maps.grad.abs().sum() > 0


def output_of(**parts):
    return StudyOutput(normal(2, 3, seed=9), None, parts)


def batch_of(valid, allowed=None, teacher=None):
    return StudyBatch(
        None, None, torch.zeros(2, 3, *GRID), valid, LABELS, allowed, teacher, ("first study", "second study")
    )


def all_parts():
    logits = {name: normal(2, 3, seed=n) for n, name in enumerate(("token_logits", "pooled_logits", "patch_logits"))}
    maps = {name: normal(2, 3, *GRID, seed=n) for n, name in enumerate(("class_maps", "foreground"), start=20)}
    return logits | maps | {"class_tokens": normal(2, 3, 5)}


def test_terms_are_named_and_weighted(allowed, valid):
    parts, teacher = all_parts(), normal(2, 3, seed=7)
    output, weights = output_of(**parts), ClarityWeights(0.5, "cosine", 2.0, 3.0, 4.0, temperature=2.0)
    terms = clarity_losses(output, batch_of(valid, allowed, teacher), weights)
    branches = [label_loss(parts[f"{name}_logits"], LABELS) for name in ("token", "pooled", "patch")]
    soft = [[sigmoid(value / 2) for value in row] for row in teacher.tolist()]
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(
        {
            "classification": sum(branches).item() / 3,
            "orthogonal": 0.5 * orthogonal(parts["class_tokens"]).item(),
            "foreground": 2 * foreground_loss(parts["foreground"], allowed, valid).item(),
            "outside": 3 * outside(parts["class_maps"], allowed, LABELS, valid).item(),
            "teacher": 4 * sum(entropy(output.logits[b, f].item(), soft[b][f]) for b in range(2) for f in range(3)) / 6,
        },
        abs=1e-5,
    )


def test_a_piece_that_is_off_has_no_term(valid, allowed):
    tokens_alone = {name: all_parts()[name] for name in ("token_logits", "class_tokens")}
    weights = ClarityWeights(orthogonal=0.0, teacher=0.5)
    assert list(clarity_losses(output_of(**tokens_alone), batch_of(valid, allowed), weights)) == ["classification"]
    assert set(clarity_losses(output_of(**all_parts()), batch_of(valid), weights)) == {"classification"}  # no prior


def test_an_unknown_way_to_part_tokens_is_refused():
    with pytest.raises(UsageFault, match="cosine, contrast"):
        ClarityWeights(orthogonal_by="angle")
