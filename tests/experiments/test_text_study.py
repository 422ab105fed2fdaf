"""The text study: its sentences, what a logit is explained by, and a small run."""

import json

import numpy as np
from keras import ops

from experiments.__main__ import main
from experiments.text import grammar, study
from experiments.text.config import TextConfig
from experiments.text.network import EMBEDDING, network


def means(words):
    """Whether a sentence praises, read anew."""
    if "but" in words:
        return means(words[words.index("but") + 1 :])
    if "though" in words:
        return means(words[: words.index("though")])
    return (words[-1] in grammar.PRAISE) != any(word in grammar.NEGATIONS for word in words)


def test_sentences_and_what_they_mean():
    tokens, labels = grammar.sentences(300, seed=0)
    assert tokens.shape == (300, grammar.LENGTH)
    sentences = [grammar.spelled(sentence) for sentence in tokens]
    assert len({*map(tuple, sentences)}) == 300
    assert [means(words) for words in sentences] == (labels[:, 0] == 1).tolist()
    # No word decides, with whatever others it is.
    for word in grammar.WORDS[1:]:
        assert 0.2 < np.mean([label for words, (label,) in zip(sentences, labels, strict=True) if word in words]) < 0.8
    assert (grammar.sentences(5, seed=1)[0] != tokens[:5]).any()


def test_the_parts_of_the_words_and_the_rest_sum_to_the_logit(monkeypatch):
    monkeypatch.setattr(study, "NODES", 16)
    model = network(TextConfig(width=8, blocks=1))
    tokens, labels = grammar.sentences(8, seed=0)
    found = study.explained(model, tokens, labels)
    logits = ops.convert_to_numpy(model(tokens))[:, 0]
    np.testing.assert_allclose([one["logit"] for one in found], logits, rtol=1e-6)
    np.testing.assert_allclose([sum(one["parts"]) + one["rest"] for one in found], logits, atol=1e-4)
    assert [len(one["parts"]) for one in found] == [len(one["words"]) for one in found]
    model.get_layer(EMBEDDING).set_weights([np.zeros((len(grammar.WORDS), 8))])
    np.testing.assert_allclose([one["rest"] for one in found], ops.convert_to_numpy(model(tokens))[:, 0], atol=1e-5)


def test_a_small_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study, "NODES", 2)
    words = ["text", "--seeds=[0]", "--strengths=[0, 0.1]", "--train_examples=64", "--test_examples=40", "--epochs=2"]
    words += ["--width=8", "--blocks=1", "--probed=16", "--shown=2", "--learning_rate=0.01", f"--folder={tmp_path}"]
    assert main(words) == 0
    rows = json.loads((tmp_path / "text.json").read_text())["rows"]
    free, held = (row["results"][0] for row in rows)
    assert len(free["norm"]) == 2
    assert held["norm"][-1] < free["norm"][-1]
    assert [one["words"] for one in free["explained"]] == [one["words"] for one in held["explained"]]
    assert {file.name for file in tmp_path.iterdir()} == {"cells", "curves.png", "tokens.png", "text.json", "text.md"}
    assert "penalty 0.1" in capsys.readouterr().out
