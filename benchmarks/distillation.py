"""Distil the bundled model into one of two layers, by several signals, and compare the students.

1. Draw batches of the bundled grammar. The teacher is asked once per batch, for all students.
2. Train one student per arm and seed, all on the same batches, from the same weights per seed.
3. At five checkpoints, measure accuracy on combinations that were held out, and how alike student
   and teacher are. The processor time of every arm counts its own share of the teacher's work.
4. Append one JSON line per student. A student whose line is there already is not trained again.
5. With ``--keep``, a file per student holds its weights and its optimizer's state every twentieth
   of the steps, so that a run that was stopped goes on from there, to the same numbers.

``python benchmarks/distillation.py --page`` makes docs/distillation.md of the lines.
"""

import argparse
import json
import math
import random
import time
from datetime import datetime
from pathlib import Path

import torch
from distillation_page import write_page
from distilled_roles import roles
from safetensors import safe_open
from safetensors.torch import save
from torch.nn.functional import kl_div, mse_loss

import tensorlens_tl
from tensorlens_tl import demo
from tensorlens_tl.demo.circuits import padded
from tensorlens_tl.demo.grammar import TWO_DIGITS
from tensorlens_tl.demo.tokenizer import IDS
from tensorlens_tl.demo.train import MIX, document_row, encoded, induction_row, training_documents
from tensorlens_tl.distillation import OperatorLoss, rows_of

RESULTS = Path(__file__).parent / "results" / "distillation.jsonl"
ARMS = ("hard", "kd", "attention", "relations", "hidden", "gradients", "maps", "maps+words")
ARMS += ("kd-warm", "maps-warm")
LAYERS = ((0, 0), (2, 1))
"""Layers of the teacher and the student whose patterns are compared."""


def new_student(seed: int):
    """A student of two layers, d_model 64, with 0.2 million weights."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    return HookedTransformer(
        HookedTransformerConfig(
            n_layers=2,
            d_model=64,
            n_heads=4,
            d_head=16,
            d_mlp=256,
            n_ctx=64,
            d_vocab=len(IDS),
            act_fn="gelu_new",
            normalization_type="LN",
            seed=seed,
            device="cpu",
        )
    )


@torch.no_grad()
def warm(student, teacher):
    """Give a student what fits of the teacher's weights: a start, and no model that works.

    The residual is projected to the principal directions of the teacher's embeddings and readout.
    W_Q W_Kᵀ and W_V W_O of a head are cut to the student's rank, and an MLP to its largest neurons.
    """
    d, W = student.cfg.d_model, teacher.state_dict()
    both = torch.cat([W["embed.W_E"], W["pos_embed.W_pos"], W["unembed.W_U"].T])
    P = torch.linalg.svd(both - both.mean(0), full_matrices=False).Vh[:d].T
    new = {"embed.W_E": W["embed.W_E"] @ P, "pos_embed.W_pos": W["pos_embed.W_pos"] @ P}
    new |= {"unembed.W_U": P.T @ W["unembed.W_U"], "unembed.b_U": W["unembed.b_U"]}
    for theirs, ours in LAYERS:
        old, own, rank = f"blocks.{theirs}.", f"blocks.{ours}.", student.cfg.d_head
        score = P.T @ W[old + "attn.W_Q"] @ W[old + "attn.W_K"].mT @ P
        score = score * (rank / teacher.cfg.d_head) ** 0.5  # both divide by √d_head
        write = P.T @ W[old + "attn.W_V"] @ W[old + "attn.W_O"] @ P
        for product, left, right in ((score, "Q", "K"), (write, "V", "O")):
            U, S, Vh = torch.linalg.svd(product)
            U, S, Vh = U[..., :rank], S[..., None, :rank].sqrt(), Vh[..., :rank, :]
            new[f"{own}attn.W_{left}"] = U * S
            new[f"{own}attn.W_{right}"] = Vh.mT * S if right == "K" else Vh * S.mT
        size = W[old + "mlp.W_in"].norm(dim=0) * W[old + "mlp.W_out"].norm(dim=1)
        best = size.topk(student.cfg.d_mlp).indices
        new[own + "mlp.W_in"] = P.T @ W[old + "mlp.W_in"][:, best]
        new[own + "mlp.W_out"] = W[old + "mlp.W_out"][best] @ P
        new[own + "mlp.b_in"] = W[old + "mlp.b_in"][best]
    for name, value in new.items():
        student.get_parameter(name).copy_(value)


def batches(rows: int, seed: int):
    """Token ids, and how much the prediction at every position counts, without end."""
    rng = random.Random(seed)
    documents = training_documents(rng, MIX)
    while True:
        drawn = [
            induction_row(rng) if rng.random() < 0.15 else document_row(documents)
            for _ in range(rows)
        ]
        ids, weights = encoded(drawn)
        yield ids, torch.cat([weights[:, 1:], torch.zeros(rows, 1)], 1)


def run(model, ids):
    """Logits, and what the arms compare: patterns, queries, keys, values and the last residual."""
    kept, last = {}, model.cfg.n_layers - 1
    names = [f"blocks.{i}.attn.hook_pattern" for i in range(model.cfg.n_layers)]
    names += [f"blocks.{last}.attn.hook_{part}" for part in "qkv"]
    names += [f"blocks.{last}.hook_resid_post", "blocks.0.hook_resid_pre"]

    def keep(tensor, hook):
        kept[hook.name] = tensor

    logits = model.run_with_hooks(ids, fwd_hooks=[(name, keep) for name in names])
    return logits, kept


def divergence(ours, theirs, weights):
    """The mean KL divergence of the student's predictions from the teacher's, in nats."""
    at = weights > 0
    p, q = theirs[at].log_softmax(-1), ours[at].log_softmax(-1)
    return (
        kl_div(q, p, log_target=True, reduction="none").sum(-1) * weights[at]
    ).sum() / weights.sum()


def relations(kept, layer, heads=4):
    """MiniLM's relations of queries, keys and values among the positions, as log-probabilities."""
    found = []
    for part in "qkv":
        x = kept[f"blocks.{layer}.attn.hook_{part}"].flatten(2).unflatten(2, (heads, -1))
        x = x.transpose(1, 2)
        found.append((x @ x.mT / math.sqrt(x.shape[-1])).log_softmax(-1))
    return torch.stack(found)


def input_gradients(logits, x, query, said, graph):
    """‖∂(centred logit) / ∂x_j‖ ‖x_j‖ of every position j, at one row per prompt.

    The product ⟨gradient, input⟩ would be 0 past a LayerNorm, which knows no lengths.
    """
    prompts = torch.arange(len(logits))
    rows = logits[prompts, query]
    value = rows[prompts, said] - rows.mean(-1)
    slope = torch.autograd.grad(value.sum(), x, create_graph=graph, retain_graph=graph)[0]
    return (slope.norm(dim=-1) * x.norm(dim=-1))[None]


class Teacher:
    """What the teacher says about a batch; everything is made once, and its time noted."""

    def __init__(self, model, ids, weights, step):
        self.model, self.ids, self.weights, self.step = model, ids, weights, step
        self.made, self.seconds = {}, {}

    def __call__(self, what):
        if what not in self.made:
            begun = time.process_time()
            self.made[what] = getattr(self, what)()
            self.seconds[what] = time.process_time() - begun
        return self.made[what]

    @torch.no_grad()
    def run(self):
        return run(self.model, self.ids)

    @torch.no_grad()
    def lens(self):
        return tensorlens_tl.capture(self.model, self.ids)

    def query(self):
        generator = torch.Generator().manual_seed(self.step)
        return torch.multinomial(self.weights, 1, generator=generator)[:, 0]

    def gradients(self):
        x = self("run")[1]["blocks.0.hook_resid_pre"].clone().requires_grad_()
        entry = [("blocks.0.hook_resid_pre", lambda t, hook: x)]
        logits = self.model.run_with_hooks(self.ids, fwd_hooks=entry)
        query = self("query")
        said = logits.detach()[torch.arange(len(logits)), query].argmax(-1)
        return said, input_gradients(logits, x, query, said, False).detach()


class Student:
    """One student in training: its model, its arm, and the processor time that it took."""

    def __init__(self, arm, seed, options, teacher=None):
        self.name, self.seed, self.options = arm, seed, options
        self.arm, _, start = arm.partition("-")
        arm = self.arm
        self.model, self.seconds, self.checkpoints, self.done = new_student(seed), 0.0, [], 0
        if start:
            warm(self.model, teacher)
        weights = list(self.model.parameters())
        torch.manual_seed(seed)
        self.project = torch.nn.Linear(64, 128) if arm == "hidden" else None
        weights += [] if self.project is None else list(self.project.parameters())
        self.weights = weights
        self.optimizer = torch.optim.AdamW(weights, lr=3e-3, weight_decay=0.01)
        n = options.steps
        ramp = (int(options.ramp[0] * n), int(options.ramp[1] * n))
        words = options.factor if arm == "maps+words" else 0.0
        self.operator = OperatorLoss(
            options.factor, words, rows=options.map_rows, ramp=ramp, seed=0
        )

    def loss(self, teacher):
        """The arm's loss, and which of the teacher's answers it needed."""
        arm, ids, weights = self.arm, teacher.ids, teacher.weights
        if arm.startswith("maps") and self.operator.weight(teacher.step):
            logits, lens = tensorlens_tl.capture(self.model, ids, graph=True)
            said, held = teacher("lens")
            own = self.operator(lens, held, weights, teacher.step)
            return divergence(logits, said, weights) + own, ("lens",)
        if arm in ("hard", "kd") or arm.startswith("maps"):
            logits = self.model(ids)
            if arm == "hard":
                at = weights[:, :-1] > 0
                losses = torch.nn.functional.cross_entropy(
                    logits[:, :-1][at], ids[:, 1:][at], reduction="none"
                )
                return (losses * weights[:, :-1][at]).sum() / weights.sum(), ()
            return divergence(logits, teacher("run")[0], weights), ("run",)
        logits, own = run(self.model, ids)
        said, theirs = teacher("run")
        total, needs = divergence(logits, said, weights), ("run",)
        if arm == "attention":
            name = "blocks.{}.attn.hook_pattern"
            pairs = [(own[name.format(b)], theirs[name.format(a)]) for a, b in LAYERS]
            total = total + sum(mse_loss(a, b) for a, b in pairs) * 64
        elif arm == "relations":
            ours, goal = relations(own, 1), relations(theirs, 3)
            total = total + (goal.exp() * (goal - ours)).sum(-1).mean()
        elif arm == "hidden":
            goal = theirs["blocks.3.hook_resid_post"]
            found = self.project(own["blocks.1.hook_resid_post"])
            total = total + mse_loss(found, goal) / goal.var()
        elif arm == "gradients":
            (token, rows), needs = teacher("gradients"), ("run", "gradients")
            x = own["blocks.0.hook_resid_pre"]
            ours = input_gradients(logits, x, teacher("query"), token, True)
            total = total + self.options.factor * self.operator.distance(ours, rows)
        return total, needs

    def step(self, teacher, lr):
        """One step of training."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        before = sum(teacher.seconds.values())
        begun = time.process_time()
        loss, needs = self.loss(teacher)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        own = time.process_time() - begun - (sum(teacher.seconds.values()) - before)
        self.seconds += own + sum(teacher.seconds[what] for what in needs)
        self.done = teacher.step + 1

    def keep(self, folder, setting):
        """Write weights and optimizer to a file of this student, whole or not at all."""
        held = {f"{i}": w.detach() for i, w in enumerate(self.weights)}
        for i, state in self.optimizer.state_dict()["state"].items():
            held |= {f"{i}.{name}": value for name, value in state.items()}
        facts = {"setting": setting, "done": self.done, "seconds": self.seconds}
        text = json.dumps(facts | {"checkpoints": self.checkpoints})
        path = folder / f"{self.name}-{self.seed}.safetensors"
        new = path.with_suffix(".new")
        new.write_bytes(save(held, {"facts": text}))
        new.rename(path)

    @torch.no_grad()
    def resume(self, folder, setting):
        """Go on from this student's file, if there is one of the same setting."""
        path = folder / f"{self.name}-{self.seed}.safetensors"
        if not path.exists():
            return
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
            held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if facts.pop("setting") != setting:
            raise SystemExit(f"{path} is of another setting. Name another folder by --keep.")
        state = self.optimizer.state_dict()
        for i, weight in enumerate(self.weights):
            weight.copy_(held[f"{i}"])
            names = [name for name in held if name.startswith(f"{i}.")]
            state["state"][i] = {name.partition(".")[2]: held[name] for name in names}
        self.optimizer.load_state_dict(state)
        for name, value in facts.items():
            setattr(self, name, value)


class Examination:
    """Held-out prompts, and what the teacher makes of them."""

    def __init__(self, teacher, n):
        self.teacher, self.n = teacher, n
        self.drawn = {
            t: demo.unseen(t, n, 1) for t in ("ioi", "facts", "agreement", "greater_than")
        }
        self.fresh = next(batches(16, 10_001))
        some = [d for drawn in list(self.drawn.values())[:3] for d in drawn[:8]]
        self.ids = [padded([d.words[: d.answers[0]]]) for d in some]
        with torch.no_grad():
            self.held = [tensorlens_tl.capture(teacher, ids) for ids in self.ids]
        self.said = [logits[:, -1].argmax(-1)[None] for logits, _ in self.held]
        self.rows = [
            self.row(lens, said) for (_, lens), said in zip(self.held, self.said, strict=True)
        ]
        self.drops = [self.drop(teacher, i) for i in range(len(self.ids))]
        rng = random.Random(10_002)
        self.repeats = encoded([induction_row(rng) for _ in range(8)])[0]
        self.teachers_roles = self.roles(teacher)

    @torch.no_grad()
    def roles(self, model):
        """What the heads look at and copy, by role."""
        some = self.drawn["ioi"][:8]
        ends = [d.answers[0] for d in some]
        cases = [
            (tensorlens_tl.capture(model, padded([d.words[:end]]))[1], IDS[d.words[end]])
            for d, end in zip(some, ends, strict=True)
        ]
        return roles([tensorlens_tl.capture(model, self.repeats)[1]], cases)

    def row(self, lens, said):
        """The row of the operator at the end of a prompt."""
        with torch.no_grad():
            return rows_of(lens, torch.tensor([[len(lens.tokens[0]) - 1]]), said)[0, 0]

    @torch.no_grad()
    def drop(self, model, i):
        """How much the centred logit falls when each token is replaced by another word."""
        ids, said = self.ids[i], self.said[i].item()
        n = ids.shape[1]
        others = ids.repeat(n, 1)
        generator = torch.Generator().manual_seed(i)
        words = torch.randint(len(IDS), (n,), generator=generator)
        others[torch.arange(1, n), torch.arange(1, n)] = words[1:]
        logits = model(others)[:, -1]
        value = logits[:, said] - logits.mean(-1)
        return value[0] - value[1:]

    def ends(self, model, drawn):
        words = [d.words[: d.answers[0]] for d in drawn]
        at = torch.tensor([len(w) for w in words])
        return model(padded(words))[torch.arange(len(words)), at]

    @torch.no_grad()
    def measure(self, model):
        """Accuracy per task, and how alike the model and the teacher are."""
        found = {}
        for task in ("ioi", "facts", "agreement"):
            drawn = self.drawn[task]
            answers = torch.tensor([IDS[d.words[d.answers[0]]] for d in drawn])
            found[task] = (self.ends(model, drawn).argmax(-1) == answers).float().mean().item()
        drawn = self.drawn["greater_than"]
        chances = self.ends(model, drawn).softmax(-1)[:, [IDS[year] for year in TWO_DIGITS]]
        after = torch.arange(100) > torch.tensor([int(d.keys[0][2]) for d in drawn])[:, None]
        found["greater_than"] = (chances * after - chances * ~after).sum(-1).mean().item()
        found["mean"] = sum(found.values()) / 4
        ids, weights = self.fresh
        found["kl"] = divergence(model(ids), self.teacher(ids), weights).item()
        cosines, drops, top, heads = [], [], [], []
        for i, (said, theirs) in enumerate(zip(self.said, self.rows, strict=True)):
            _, lens = tensorlens_tl.capture(model, self.ids[i])
            row = self.row(lens, said)
            cosines.append(torch.cosine_similarity(row, theirs, 0).item())
            top.append(float(row[1:].argmax() == theirs[1:].argmax()))
            pair = torch.stack([self.drop(model, i), self.drops[i]])
            drops.append(torch.corrcoef(pair)[0, 1].item())
            heads.append(best_match(self.held[i][1], lens))
        query = torch.multinomial(weights, 4, generator=torch.Generator().manual_seed(0)).T
        said, theirs = tensorlens_tl.capture(self.teacher, ids)
        tokens = said[torch.arange(len(ids)), query].argmax(-1)
        rows = [
            rows_of(lens, query, tokens) for lens in (tensorlens_tl.capture(model, ids)[1], theirs)
        ]
        found["map_cosine"] = torch.cosine_similarity(*rows, -1).mean().item()
        means = {"answer_rows": cosines, "word_drops": drops, "top_token": top, "heads": heads}
        found |= {name: sum(values) / len(values) for name, values in means.items()}
        return found | {"roles": self.roles(model)}


def best_match(teacher, student):
    """The mean over the teacher's heads of the cosine with the student's most similar pattern."""
    ours, theirs = (
        torch.cat([block.attn.pattern[0] for block in lens.capture.blocks]).flatten(1)
        for lens in (student, teacher)
    )
    ours, theirs = (x / x.norm(dim=1, keepdim=True) for x in (ours, theirs))
    return (theirs @ ours.T).amax(1).mean().item()


def cost(options, repeats=15):
    """Processor time of a step by each signal against plain distillation, step beside step."""
    model = demo.load_model("hooked").requires_grad_(False)
    options.steps, options.ramp = repeats + 1, (0.0, 0.0)
    kinds = {
        "kd": ("kd", 1),
        "kd again": ("kd", 1),
        "maps": ("maps", 1),
        "maps, 2 rows": ("maps", 2),
    }
    kinds["maps+words"] = ("maps+words", 1)
    students = {}
    for name, (arm, options.map_rows) in kinds.items():
        students[name] = Student(arm, 0, options)
    stream, ratios = batches(options.rows, 0), {name: [] for name in kinds}
    for step in range(repeats + 1):
        ids, weights = next(stream)
        took = {}
        for name, student in students.items():
            before = student.seconds
            student.step(Teacher(model, ids, weights, step), 1e-3)
            took[name] = student.seconds - before
        for name in kinds if step else ():  # the first step warms up
            ratios[name].append(took[name] / took["kd"])
    return {name: sorted(values)[len(values) // 2] for name, values in ratios.items()}


def main():
    """Train and examine the students that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=32, help="rows of 64 tokens a batch")
    parser.add_argument("--factor", type=float, default=0.3, help="of maps, words and gradients")
    parser.add_argument("--map-rows", type=int, default=1, help="rows of the operator a prompt")
    parser.add_argument("--ramp", nargs=2, type=float, default=(0.25, 0.5), help="shares of steps")
    parser.add_argument("--prompts", type=int, default=200, help="held-out prompts a task")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop training by then")
    parser.add_argument("--keep", type=Path, help="a folder for students in training")
    parser.add_argument("--until", help="a time such as 22:25, after which no step begins")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--cost", action="store_true", help="only measure what a step costs")
    parser.add_argument("--page", action="store_true", help="only write docs/distillation.md")
    options = parser.parse_args()
    if options.page:
        write_page()
        return
    torch.set_num_threads(1)
    if options.cost:
        line = json.dumps({"rows": options.rows, "cost": cost(options)})
        print(line)
        with options.out.open("a") as file:
            file.write(line + "\n")
        return
    setting = {
        k: getattr(options, k) for k in ("steps", "rows", "factor", "map_rows", "ramp", "prompts")
    }
    setting["ramp"] = list(setting["ramp"])
    # 4. Students that were trained already are left out.
    known = (
        [json.loads(line) for line in options.out.read_text().splitlines()]
        if options.out.exists()
        else []
    )
    done = {(r["arm"], r["seed"]) for r in known if r.get("setting") == setting}
    model = demo.load_model("hooked").requires_grad_(False)
    students = [
        Student(arm, seed, options, model)
        for seed in options.seeds
        for arm in options.arms
        if (arm, seed) not in done
    ]
    if options.keep:
        options.keep.mkdir(parents=True, exist_ok=True)
        for student in students:
            # 5. Students that stand in the middle go on.
            student.resume(options.keep, setting)
    train(students, model, options, setting)


def train(students, model, options, setting):
    """Train students side by side, each from where it stands; write those that have ended."""
    exam, stream, begun = Examination(model, options.prompts), batches(options.rows, 0), time.time()
    last = False
    for step in range(options.steps):
        # 1. A batch, and what the teacher makes of it.
        ids, weights = next(stream)
        lr = 3e-3 * min((step + 1) / 50, 0.51 + 0.49 * math.cos(math.pi * step / options.steps))
        own = [student for student in students if student.done == step]
        teacher = Teacher(model, ids, weights, step)
        # 2. A step of every student that stands here.
        for student in own:
            student.step(teacher, lr)
        late = options.until and datetime.now().strftime("%H:%M") >= options.until
        over = bool(late) or time.time() - begun > 60 * options.minutes
        last = step + 1 == options.steps or (over and not options.keep)
        # 3. A checkpoint.
        if last or (step + 1) % max(1, options.steps // 5) == 0:
            for student in own:
                point = {"step": step + 1, "seconds": student.seconds}
                student.checkpoints.append(point | exam.measure(student.model))
                said = json.dumps(student.checkpoints[-1])
                print(student.name, student.seed, said, flush=True)
        # 5. Kept, so that another run goes on from here.
        if options.keep and (last or over or (step + 1) % max(1, options.steps // 20) == 0):
            for student in own:
                student.keep(options.keep, setting)
        if last or over:
            break
    # 4. A line for every student that is done.
    options.out.parent.mkdir(exist_ok=True)
    with options.out.open("a") as file:
        for student in students if last else ():
            line = {"arm": student.name, "seed": student.seed, "setting": setting}
            line |= {"teachers_roles": exam.teachers_roles, "checkpoints": student.checkpoints}
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
