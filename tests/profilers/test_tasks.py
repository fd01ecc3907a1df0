import json
import math

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from profilers import tasks
from profilers.base import NotApplicableError, ProfilerError
from profilers.tasks import TaskResult, compare, encode_pair, read_task, score
from tests.tiny_models import build

LETTERS = "abcdefghijklmnopqrstuvwxyz.?:"


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes with a few merges, so that where context and continuation are parted matters."""
    symbols = ["<s>", "</s>", "Ġ", "Ċ", *LETTERS, *(chr(code) for code in range(0x100, 0x118) if chr(code) not in "ĠĊ")]
    merges = [("Ġ", "a"), ("a", "b"), ("Ġ", "c"), ("Ġc", "a"), ("c", "a"), ("Ċ", "Ġ")]
    vocabulary = {symbol: index for index, symbol in enumerate([*symbols, *("".join(pair) for pair in merges)])}
    raw = Tokenizer(BPE(vocabulary, merges))
    raw.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")


def write(folder, lines, name="task.jsonl"):
    path = folder / name
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def choice(query, choices, gold=0):
    return {"query": query, "choices": choices, "gold": gold}


def model(**options):
    """Return a tiny model whose logits differ enough between tokens for choices to differ."""
    found = build("llama", **options)
    with torch.no_grad():
        found.lm_head.weight *= 30
    return found


def log_likelihood(found, context, continuation):
    """Score one pair by itself: full float64 logits, nothing batched or padded."""
    with torch.no_grad():
        logits = found(torch.tensor([context + continuation])).logits[0].double().log_softmax(-1)
    steps = range(len(context) - 1, len(context) + len(continuation) - 1)
    total = sum(logits[step, token].item() for step, token in zip(steps, continuation, strict=True))
    greedy = all(logits[step].argmax() == token for step, token in zip(steps, continuation, strict=True))
    return total, greedy


# --- encoding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "continuation", "before", "after"),
    [
        ("x", "ca", ["x"], ["Ġca"]),  # the space belongs to the continuation's first token
        ("x ", "ca", ["x"], ["Ġ", "Ġca"]),  # trailing spaces of the context go to the continuation
        ("x\n", "b", ["x"], ["ĊĠ", "b"]),
        ("x", " ca", ["x"], ["Ġca"]),  # a continuation that brings its space gets no second one
        ("", "ca", ["<s>"], ["Ġca"]),
        ("  ", "ca", ["<s>"], ["Ġ", "Ġ", "Ġca"]),
    ],
)
def test_context_and_continuation_are_parted_as_the_harness_does(tokenizer, context, continuation, before, after):
    found = encode_pair(tokenizer, context, continuation)
    assert [tokenizer.convert_ids_to_tokens(part) for part in found] == [before, after]


def test_a_merge_across_the_seam_follows_the_harness(tokenizer):
    """The harness cuts the whole's tokens at the context's own count, whatever they then cover."""
    context, continuation = "a", "b"
    whole = tokenizer("a b", add_special_tokens=False)["input_ids"]
    assert encode_pair(tokenizer, context, continuation) == (whole[:1], whole[1:])


def test_bos_where_the_tokenizer_adds_it(tokenizer):
    class AddsBos:
        bos_token_id, eos_token_id = 0, 1

        def __call__(self, text, add_special_tokens=True, verbose=True):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [0, *ids] if add_special_tokens else ids}

    plain = encode_pair(tokenizer, "x", "ca")
    assert encode_pair(AddsBos(), "x", "ca") == ([0, *plain[0]], plain[1])
    assert encode_pair(AddsBos(), "", "ca")[0] == [0]


# --- scoring --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba", "mixtral"])
def test_batched_scores_are_those_of_each_pair_by_itself(tokenizer, tmp_path, monkeypatch, name):
    monkeypatch.setattr(tasks, "BATCH_TOKENS", 60)
    found = build(name)
    queries = ["abc", "where is the cab", "a", "is it a cab or a bus? " * 3]
    rows = [choice(query, ["cab", "a bus of any kind", "no", "ca"], gold=index) for index, query in enumerate(queries)]
    task = read_task(write(tmp_path, rows))
    result = score(found, tokenizer, task)
    for sample, gold, *flags in zip(task.samples, range(4), *result.correct.values(), strict=True):
        sums = [
            log_likelihood(found, *encode_pair(tokenizer, sample.context, text))[0] for text in sample.continuations
        ]
        lengths = [len(text) for text in sample.continuations]
        assert flags[0] == (sums.index(max(sums)) == gold)
        normed = [total / length for total, length in zip(sums, lengths, strict=True)]
        assert flags[1] == (normed.index(max(normed)) == gold)
    assert list(result.correct) == ["acc", "acc_norm", "acc_bytes"]


def test_sums_of_batches_are_those_of_each_pair(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "BATCH_TOKENS", 50)
    found = model(dtype=torch.float64)
    task = read_task(write(tmp_path, [choice("abc? " * k, ["cab", "no cab", "x"]) for k in (1, 7, 2, 5)]))
    requests = tasks._requests(found, tokenizer, task)
    scores = tasks._log_likelihoods(found, requests, "t", tasks.SilentProgress())
    pairs = [encode_pair(tokenizer, s.context, text) for s in task.samples for text in s.continuations]
    for (total, greedy), pair in zip(scores, pairs, strict=True):
        expected = log_likelihood(found, *pair)
        assert total == pytest.approx(expected[0], rel=1e-10) and greedy == expected[1]


def test_lengths_in_characters_and_in_bytes_decide_differently(tmp_path):
    """Sums -4.5 and -6.3: one character against two, but three bytes against two."""
    task = read_task(write(tmp_path, [choice("x", ["€", "ab"], gold=0)]))
    flags = tasks._metrics(task.kind, task.samples[0], [(-4.5, False), (-6.3, False)])
    assert flags == {"acc": True, "acc_norm": False, "acc_bytes": True}


def test_cloze_counts_what_greedy_decoding_gives(tokenizer, tmp_path):
    found = model()
    context = tokenizer("where is the", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        ids = found.generate(torch.tensor([context]), max_new_tokens=40, do_sample=False, pad_token_id=0)[0]
    rows = [{"context": "where is the", "continuation": text} for text in ("cab", "x")]
    task = read_task(write(tmp_path, rows))
    result = score(found, tokenizer, task)
    assert (result.kind, list(result.correct)) == ("cloze", ["acc"])
    greedy = ids[len(context) :].tolist()
    for text, flag in zip(("cab", "x"), result.correct["acc"], strict=True):
        continuation = encode_pair(tokenizer, "where is the", text)[1]
        assert flag == (greedy[: len(continuation)] == continuation)


def test_a_cloze_continuation_is_right_only_if_every_token_is_ranked_first(tmp_path):
    class Letters:
        """Spaces and z are token 0."""

        bos_token_id = eos_token_id = None

        def __call__(self, text, add_special_tokens=True, verbose=True):
            return {"input_ids": [0 if letter in " z" else ord(letter) % 90 for letter in text]}

    found = build("llama")
    with torch.no_grad():
        found.model.norm.weight.zero_()  # all logits are 0, so token 0 is ranked first everywhere
    rows = [{"context": "abc", "continuation": text} for text in ("zz", "za", "az", " z")]
    task = read_task(write(tmp_path, rows))
    assert score(found, Letters(), task).correct == {"acc": (True, False, False, True)}
    with pytest.raises(ProfilerError, match="the context is empty and the tokenizer has no BOS or EOS"):
        score(found, Letters(), read_task(write(tmp_path, [{"context": "", "continuation": "z"}])))


def test_long_contexts_lose_their_start(tokenizer, tmp_path):
    found = model()
    found.config.max_position_embeddings = 16
    task = read_task(write(tmp_path, [choice("xyz" * 20, ["cab", "no"])]))
    read, continuation = tasks._requests(found, tokenizer, task)[0]
    context, expected = encode_pair(tokenizer, "xyz" * 20, "cab")
    assert (read, continuation) == ((context + expected)[-17:-1], expected) and len(read) == 16
    score(found, tokenizer, task)
    with pytest.raises(ProfilerError, match="line 1: a continuation of .* is past the model's 16 positions"):
        score(found, tokenizer, read_task(write(tmp_path, [choice("x", ["cab" * 20, "no"])])))


def test_what_cannot_be_scored(tokenizer, tmp_path):
    task = read_task(write(tmp_path, [choice("x", ["cab", "no"])]))
    with pytest.raises(ProfilerError, match="needs a tokenizer"):
        score(model(), None, task)
    with pytest.raises(NotApplicableError, match="encoder-decoder"):
        score(build("t5"), tokenizer, task)
    broken = model()
    broken.lm_head.weight.data[:] = math.nan
    with pytest.raises(ProfilerError, match="'task': log-probabilities are not finite"):
        score(broken, tokenizer, task)


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 has list; needed are query, choices and gold, or context and continuation"),
        ({"question": "a", "answer": "b"}, "line 2 has answer, question; needed"),
        (choice("q", ["one"]), "line 2: 'choices' is not a list of two or more"),
        (choice("q", "yes"), "line 2: 'choices' is not a list"),
        (choice("q", ["a", "b"], 2), "line 2: 'gold' is 2, not the index of one of 2 choices"),
        (choice("q", ["a", "b"], "a"), "line 2: 'gold' is 'a'"),
        (choice("q", ["a", "b"], True), "line 2: 'gold' is True"),
        (choice("q", ["a", ""]), "line 2: .*no continuation is empty"),
        (choice(3, ["a", "b"]), "line 2: the context and every continuation are texts"),
        ({"context": "a", "continuation": "b"}, "line 2 is a cloze sample among multiple-choice ones"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    with pytest.raises(ProfilerError, match=message):
        read_task(write(tmp_path, [choice("q", ["a", "b"]), line]))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ProfilerError, match="no task file at"):
        read_task(tmp_path / "none.jsonl")
    with pytest.raises(ProfilerError, match="cannot read task file"):
        read_task(tmp_path)
    (tmp_path / "latin.jsonl").write_bytes(b"\xe9\n")
    with pytest.raises(ProfilerError, match="cannot read task file"):
        read_task(tmp_path / "latin.jsonl")
    with pytest.raises(ProfilerError, match="holds no sample"):
        read_task(write(tmp_path, ["", "  "]))


def test_samples_are_limited_by_seed_in_the_files_order(tmp_path):
    path = write(tmp_path, [choice(f"q{index}", ["a", "b"]) | {"extra": 1} for index in range(50)], "quiz.jsonl")
    whole = read_task(path)  # the default limit is larger
    assert (whole.name, whole.available, len(whole.samples)) == ("quiz", 50, 50)
    one, same, other = (read_task(path, limit=10, seed=seed) for seed in (1, 1, 2))
    assert one == same != other
    assert (one.available, len(one.samples)) == (50, 10)
    lines = [sample.line for sample in one.samples]
    assert lines == sorted(set(lines))
    assert read_task(path, limit=99).samples == read_task(path, limit=None).samples == whole.samples


def test_a_line_separator_inside_a_string_ends_no_line(tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_text(json.dumps(choice("a\u2028b", ["a", "b"]), ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert read_task(path).samples[0].context == "a\u2028b"


# --- comparing ------------------------------------------------------------------------------------------------------


def result(flags, fingerprint="f"):
    return TaskResult("quiz", "cloze", 8, fingerprint, {"acc": tuple(map(bool, flags))})


def test_comparison_pairs_the_samples():
    (found,) = compare(result([1, 1, 0, 0, 1, 1, 1, 0]), result([1, 1, 1, 0, 0, 1, 1, 1]))
    assert (found.name, found.kind, found.metric, found.samples, found.available) == ("quiz", "cloze", "acc", 8, 8)
    assert (found.before, found.after, found.difference) == (6 / 8, 5 / 8, -1 / 8)
    assert found.interval[0] < 5 / 8 < found.interval[1]
    assert found.difference_interval[0] < -1 / 8 < found.difference_interval[1]


def test_without_an_original_there_is_no_difference():
    (found,) = compare(result([1, 0]))
    assert (found.before, found.after, found.difference, found.difference_interval) == (None, 0.5, None, None)


def test_results_on_other_samples_are_not_compared():
    with pytest.raises(ProfilerError, match="'quiz' was scored on other samples"):
        compare(result([1, 0]), result([1, 0], "other"))
