"""Methods inside the language model, end to end, against slow computations that share no code with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from mmefficient.errors import InputError, ModelError, PlanError
from mmefficient.methods.reducers.dyvte import DyVTE
from mmefficient.methods.reducers.pyramiddrop import PyramidDrop
from mmefficient.methods.reducers.sparsevlm import SparseVLM, density_peaks, matching_words
from mmefficient.plan import Plan
from mmefficient.profiles import Checkpoint, Profile
from tests import tiny
from tests.executor.oracle import decoder_inputs, image_columns


class Slow:
    """One row of a LLaVA prompt, layer by layer, with every attention map at hand."""

    def __init__(self, model: Any, prompt: Any) -> None:
        self.model, self.decoder = model, model.get_decoder()
        batch = tiny.collate("llava", [prompt])
        self.hidden, position = decoder_inputs(model, batch)
        self.hidden, self.columns = self.hidden[0], torch.arange(self.hidden.shape[1])
        self.cos, self.sin = (x[0] for x in self.decoder.rotary_emb(self.hidden[None], position))
        self.images = image_columns(batch["input_ids"][0])
        self.visual = torch.cat(self.images)
        self.map = torch.empty(0)

    def heads(self, layer: int, rotate: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Query and key [H, n, d], keys repeated for grouped queries."""
        block = self.decoder.layers[layer]
        x, attention = block.input_layernorm(self.hidden), block.self_attn
        query, key = (p(x).unflatten(-1, (-1, 8)).transpose(0, 1) for p in (attention.q_proj, attention.k_proj))
        if rotate:
            query, key = (self.rotate(y, self.cos[self.columns], self.sin[self.columns]) for y in (query, key))
        return query, key.repeat_interleave(2, 0)

    @staticmethod
    def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def attention(self, layer: int) -> torch.Tensor:
        """Mean over heads of the causal attention map, [n, n]."""
        query, key = self.heads(layer)
        scores = query @ key.transpose(1, 2) / 8**0.5
        hide = torch.ones(scores.shape[1:]).triu(1).bool()
        return scores.masked_fill(hide, float("-inf")).softmax(-1).mean(0)

    def run(self, layer: int) -> None:
        self.map = self.attention(layer)
        rope = self.cos[None, self.columns], self.sin[None, self.columns]
        mask = torch.ones(len(self.columns), len(self.columns)).tril().bool()[None, None]
        self.hidden = self.decoder.layers[layer](self.hidden[None], attention_mask=mask, position_embeddings=rope)[0]

    def slots(self) -> list[int]:
        """Where the visual tokens are now."""
        return [slot for slot, column in enumerate(self.columns.tolist()) if column in self.visual.tolist()]

    def question(self) -> list[int]:
        return [slot for slot, column in enumerate(self.columns.tolist()) if column > int(self.visual[-1])]

    def drop(self, gone: set[int]) -> None:
        stay = [slot for slot in range(len(self.columns)) if slot not in gone]
        self.hidden, self.columns = self.hidden[stay], self.columns[stay]

    def kept(self) -> list[int]:
        return [self.visual.tolist().index(column) for column in self.columns[self.slots()].tolist()]


PROMPT = tiny.prompt("llava", 2, 3, 6)


def reported(model: Any, plan: str) -> list[list[int]]:
    with Plan(plan).apply(model) as run, torch.no_grad():
        model(**tiny.collate("llava", [PROMPT]))
    report = run.report()
    return [report.kept(0, layer).tolist() for layer in range(tiny.LAYERS)]


def best(scores: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


@torch.no_grad()
def test_pyramiddrop_equals_the_slow_rule() -> None:
    """Two images with a budget each; ranked by the maps of the layers that follow."""
    model = tiny.build("llava")
    slow, expected = Slow(model, PROMPT), []
    for layer in range(tiny.LAYERS):
        if layer:
            row, gone = slow.attention(layer)[-1], set[int]()
            for image in slow.images:
                own = [slot for slot in slow.slots() if slow.columns[slot] in image]
                stay = best([float(row[slot]) for slot in own], int((0.75, 0.5, 0.2)[layer - 1] * 16 + 0.5))
                gone |= set(own) - {own[place] for place in stay}
            slow.drop(gone)
        expected.append(slow.kept())
        slow.run(layer)
    assert reported(model, "pyramiddrop(shares=(0.75,0.5,0.2))") == expected


def slow_raters(visual: torch.Tensor, text: torch.Tensor) -> list[int]:
    votes = [0.0] * len(text)
    for x in visual:
        weights = torch.softmax(torch.stack([x @ y for y in text]), 0)
        votes = [vote + float(weight) for vote, weight in zip(votes, weights, strict=True)]
    return [i for i, vote in enumerate(votes) if vote > sum(votes) / len(votes)] or list(range(len(text)))


@torch.no_grad()
def test_sparsevlm_equals_the_slow_rule() -> None:
    model = tiny.build("llava")
    slow, expected = Slow(model, PROMPT), []
    question = slow.columns[slow.question()]
    words = question[slow_raters(slow.hidden[slow.visual], slow.hidden[question])].tolist()
    for layer in range(tiny.LAYERS):
        if layer:
            asking = [slow.columns.tolist().index(column) for column in words]
            row, gone = slow.map[asking].mean(0), set[int]()
            for image in slow.images:
                own = [slot for slot in slow.slots() if slow.columns[slot] in image]
                stay = best([float(row[slot]) for slot in own], int((0.75, 0.5, 0.2)[layer - 1] * 16 + 0.5))
                gone |= set(own) - {own[place] for place in stay}
            slow.drop(gone)
        expected.append(slow.kept())
        slow.run(layer)
    assert reported(model, "sparsevlm(shares=(0.75,0.5,0.2),recycle=0)") == expected


def slow_density_peaks(points: torch.Tensor, groups: int) -> tuple[list[int], list[int]]:
    """Centres by falling fitness, and the centre of every point."""
    places = range(len(points))
    apart = [[float((x - y).norm()) / points.shape[1] ** 0.5 for y in points] for x in points]
    density = [-sum(d * d for d in sorted(row)[:groups]) / groups for row in apart]
    density = [float(torch.tensor(value).exp()) for value in density]
    farthest = max(max(row) for row in apart)
    lead = [min((apart[i][j] for j in places if (density[j], -j) > (density[i], -i)), default=farthest) for i in places]
    fitness = [density[i] * lead[i] for i in places]
    centres = sorted(places, key=lambda i: (-fitness[i], i))[:groups]
    return centres, [i if i in centres else min(sorted(centres), key=lambda c: apart[i][c]) for i in places]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_density_peaks_equal_the_slow_rule(groups: int) -> None:
    torch.manual_seed(0)
    points = torch.randn(2, 9, 5)
    points[1, 3] = points[1, 1]  # a tie
    real = torch.arange(9) < torch.tensor([[9], [6]])
    order, group = density_peaks(points, real, torch.tensor([[groups], [2]]))
    for row, (count, wanted) in enumerate(((9, groups), (6, 2))):
        centres, member = slow_density_peaks(points[row, :count], wanted)
        assert order[row, :wanted].tolist() == centres
        assert group[row, :count].tolist() == member


@torch.no_grad()
def test_sparsevlm_merges_what_it_recycles() -> None:
    """What enters the layer after the first stage: kept tokens as they were, and the mean of each group."""
    model = tiny.build("llava")
    slow = Slow(model, tiny.prompt("llava", 1, 3, 6))
    question = slow.columns[slow.question()]
    words = question[slow_raters(slow.hidden[slow.visual], slow.hidden[question])].tolist()
    slow.run(0)
    scores = slow.map[words].mean(0)[slow.visual].tolist()
    ranked = sorted(range(16), key=lambda i: (-scores[i], i))
    kept, pool = ranked[:4], ranked[4 : 4 + int(0.9 * 12) + 1]
    states = slow.hidden[slow.visual]
    centres, group = slow_density_peaks(states[pool], 2)
    rows = {place: states[place] for place in kept}
    rows |= {pool[c]: states[[pool[i] for i in range(len(pool)) if group[i] == c]].mean(0) for c in centres}
    given: list[torch.Tensor] = []
    plan = Plan("sparsevlm(shares=(0.25,0.25,0.25),recycle=0.9,layers=(1,2,3))")
    with plan.apply(model) as run:
        layer = model.get_decoder().layers[1].input_layernorm
        handle = layer.register_forward_pre_hook(lambda module, args: given.append(args[0]))
        model(**tiny.collate("llava", [tiny.prompt("llava", 1, 3, 6)]))
        handle.remove()
    assert run.report().kept(0, 1).tolist() == sorted(rows)
    expected = torch.stack([rows[place] for place in sorted(rows)])
    torch.testing.assert_close(given[0][0, 3 : 3 + len(rows)], expected, rtol=0, atol=1e-5)


def test_words_without_a_favourite_all_vote() -> None:
    text, valid = torch.ones(1, 3, 4), torch.tensor([[True, True, False]])
    assert matching_words(torch.randn(1, 5, 4), torch.ones(1, 5).bool(), text, valid).tolist() == [[True, True, False]]


@torch.no_grad()
@pytest.mark.parametrize("bias", [0.0, 3.0, -1e6, 1e6])
def test_dyvte_leaves_where_the_slow_gates_say(bias: float) -> None:
    model, weights = tiny.build("llava"), Profile.read(tiny.GATES).tensors(torch.device("cpu"), torch.float32)
    slow, leaves = Slow(model, PROMPT), tiny.LAYERS
    for layer in range(tiny.LAYERS - 1):
        slow.run(layer)
        *before, last = (slow.hidden[slot] for slot in slow.question())
        z = torch.cat([torch.stack(before).mean(0), last])
        stay, leave = weights["outer"][layer] @ F.gelu(weights["inner"][layer] @ z)
        if leave - stay + bias > 0:
            leaves = layer + 1
            break
    kept = reported(model, f"dyvte(gates='{tiny.GATES}',bias={bias})")
    assert [len(each) for each in kept] == [32] * leaves + [0] * (tiny.LAYERS - leaves)


@torch.no_grad()
def test_urag_ranks_pages_by_question_attention() -> None:
    model = tiny.build("llava")
    slow = Slow(model, PROMPT)
    slow.run(0)
    slow.run(1)
    mass = [float(slow.map[slow.question()][:, image].sum()) for image in slow.images]
    page = mass.index(max(mass))
    assert reported(model, "urag(keep=1,layer=2)")[2] == list(range(page * 16, page * 16 + 16))
    assert reported(model, "urag(keep=2,layer=2)+exit(layer=3)")[2] == list(range(32))


@torch.no_grad()
def test_urag_ranks_pages_by_its_head() -> None:
    model, weights = tiny.build("llava"), Profile.read(tiny.HEAD).tensors(torch.device("cpu"), torch.float32)
    slow = Slow(model, PROMPT)
    slow.run(0)
    inner = F.gelu(slow.hidden @ weights["inner"].T + weights["inner_bias"])
    e = F.normalize(inner @ weights["outer"].T + weights["outer_bias"], dim=-1)
    scores = [sum(max(float(e[q] @ e[p]) for p in image) for q in slow.question()) for image in slow.images]
    page = scores.index(max(scores))
    assert reported(model, f"urag(keep=0.5,head='{tiny.HEAD}')")[1] == list(range(page * 16, page * 16 + 16))


def slow_pact(slow: Slow, layer: int, keep: float, cutoff: float, reach: float) -> list[dict[int, list[int]]]:
    """For each image the released rule, one token at a time: members (slots) of each centre's cluster (slots)."""
    still_query, still_key = slow.heads(layer, rotate=False)
    _, turned = slow.heads(layer)
    turned = turned[::2]  # each key once
    found = []
    for image in slow.images:
        own = [slot for slot in slow.slots() if slow.columns[slot] in image]
        mean = still_query[:, own].mean(1)
        shares = torch.softmax((still_key[:, own] @ mean[..., None])[..., 0] / 8**0.5, -1).mean(0)
        score = {slot: float(share * slow.hidden[slot].norm()) for slot, share in zip(own, shares, strict=True)}
        kept = sorted(sorted(own, key=lambda slot: (-score[slot], slot))[: int(keep * len(own) + 0.5)])
        flat = {slot: turned[:, slot].flatten() for slot in own}
        apart = {(i, j): 1 - float(F.cosine_similarity(flat[i], flat[j], dim=0)) for i in own for j in own}
        density = {i: sum(float(torch.tensor(-((apart[i, j] / 2) ** 2)).exp()) for j in kept) for i in kept}
        middles: list[int] = []
        for i in sorted(kept, key=lambda i: (-density[i], i)):
            if all(apart[i, j] > cutoff for j in middles):
                middles.append(i)
        members: dict[int, list[int]] = {i: [] for i in sorted(middles)}
        for i in own:
            nearest = i if i in middles else min(sorted(middles), key=lambda c: apart[i, c])
            if nearest == i or apart[i, nearest] <= reach * cutoff:
                members[nearest].append(i)
        found.append(members)
    return found


@torch.no_grad()
@pytest.mark.parametrize(("keep", "cutoff", "reach"), [(0.8, 0.5, 1.5), (0.5, 0.6, 1.0), (1.0, 0.0, 1.0)])
def test_pact_equals_the_slow_rule(keep: float, cutoff: float, reach: float) -> None:
    """Who is merged, what enters the layer, and logits whose keys weigh by their number."""
    model = tiny.build("llava")
    slow = Slow(model, PROMPT)
    slow.run(0)
    clusters = {c: members for image in slow_pact(slow, 1, keep, cutoff, reach) for c, members in image.items()}
    hidden, size = slow.hidden.clone(), torch.ones(len(slow.hidden))
    for middle, members in clusters.items():
        hidden[middle], size[middle] = slow.hidden[members].mean(0), len(members)
    slow.hidden = hidden
    gone = set(slow.slots()) - set(clusters)
    size = size[[slot for slot in range(len(size)) if slot not in gone]]
    slow.drop(gone)
    kept = slow.kept()
    mask = torch.ones(len(size), len(size)).tril().log() + size.log()
    for layer in range(1, tiny.LAYERS):
        rope = slow.cos[None, slow.columns], slow.sin[None, slow.columns]
        block = slow.decoder.layers[layer]
        slow.hidden = block(slow.hidden[None], attention_mask=mask[None, None], position_embeddings=rope)[0]
    expected = model.lm_head(slow.decoder.norm(slow.hidden))
    with Plan(f"pact(layer=1,keep={keep},cutoff={cutoff},reach={reach})").apply(model) as run:
        got = model(**tiny.collate("llava", [PROMPT])).logits[0]
    assert run.report().kept(0, 1).tolist() == kept
    if cutoff:
        assert 2 < len(kept) < 30
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_pact_weighs_keys_while_decoding() -> None:
    """Cached decoding equals reading prompt and answer in one go."""
    model, batch = tiny.build("llava"), tiny.collate("llava", [PROMPT])
    with Plan("pact(layer=1,keep=0.8,cutoff=0.5)").apply(model):
        out = model.generate(
            **batch, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        longer = dict(batch, input_ids=out.sequences[:, :-1])
        longer["attention_mask"] = torch.ones_like(longer["input_ids"])
        whole = model(**longer).logits[:, -4:]
    torch.testing.assert_close(torch.stack(out.logits, 1), whole, rtol=0, atol=1e-4)


def test_profiles_are_found_by_the_weights(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("llava")
    plan = Plan("exit(layer=auto)")
    with pytest.raises(ModelError, match="no exit profile"), plan.apply(model):
        pass
    monkeypatch.setenv("MMEFFICIENT_PROFILES", str(tmp_path))
    Profile.make("exit", Checkpoint(tiny.build("llava", seed=1), tiny.LAYERS), {"layer": 1}).write(
        tmp_path / "exit-other.json"
    )
    Profile.make("exit", Checkpoint(model, tiny.LAYERS), {"layer": 2}).write(tmp_path / "exit-own.json")
    assert [len(kept) for kept in reported(model, "exit(layer=auto)")] == [32, 32, 0, 0]
    with (
        pytest.raises(InputError, match="not for 'dyvte'"),
        Plan(f"dyvte(gates='{tmp_path}/exit-own.json')").apply(model),
    ):
        pass
    with pytest.raises(InputError, match="is not a profile"), Plan("dyvte(gates=missing)").apply(model):
        pass
    assert str(Plan("dyvte(gates='a/b.json')")) == "dyvte(gates='a/b.json',bias=0.0)"
    assert Plan(str(Plan([DyVTE(gates="a/b.json")]))) == Plan([DyVTE(gates="a/b.json")])


def test_stages_fit_the_depth_of_the_model() -> None:
    model = tiny.build("llava")
    for layers, drop, sparse in ((32, [8, 16, 24], [3, 7, 16]), (12, [3, 6, 9], [1, 3, 6]), (4, [1, 2, 3], [1, 2, 3])):
        checkpoint = Checkpoint(model, layers)
        assert [stage.site for stage in PyramidDrop().stages(checkpoint)] == drop
        assert [stage.site for stage in SparseVLM().stages(checkpoint)] == sparse
    plan = Plan("pyramiddrop(shares=(0.5,0.25,0.125))+exit(layer=3)")
    assert Plan.from_dict(plan.to_dict()) == plan
    for wrong in ("pyramiddrop(shares=(0.5,0.25))", "pyramiddrop(shares=(0.2,0.5,0.1))", "sparsevlm(recycle=1.0)"):
        with pytest.raises(PlanError):
            Plan(wrong)
    with pytest.raises(PlanError, match="rising order"), Plan("pyramiddrop(layers=(3,2,1))").apply(model):
        pass
    with pytest.raises(PlanError, match="out of range"), Plan("pyramiddrop(layers=(1,2,9))").apply(model):
        pass


@torch.no_grad()
def test_a_budget_may_be_a_mean_over_layers() -> None:
    model = tiny.build("llava")
    kept = [len(each) for each in reported(model, "fastv(layer=1,keep=0.5,over=layers)")]
    assert kept == [32, 10, 10, 10]  # of each image 16, then round(16 / 3)
    assert str(Plan("fastv(layer=1,keep=0.5)")) == "fastv(layer=1,keep=0.5)"
    with (
        pytest.raises(PlanError, match="spent before layer 2"),
        Plan("fastv(layer=2,keep=0.5,over=layers)").apply(model),
    ):
        pass
    with pytest.raises(PlanError, match="is a fraction"):
        Plan("fastv(keep=5,over=layers)")
    with pytest.raises(PlanError, match="acts before"):
        Plan("fastv(layer=2)+fastv(layer=1)")
