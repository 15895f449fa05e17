"""Hostile documents end no run: each is kept or rejected by name, and ordinary pages are not touched."""

from experiments.benchmarks import hostile_run
from llama3_jax.curation import engine


def test_each_is_kept_or_rejected_and_ordinary_pages_are_kept(tmp_path):
    engine.start()
    names = list(hostile_run.cases(0))
    outcomes = hostile_run.curate(names, tmp_path / "run", 20_000, 5)
    assert len(outcomes) == len(names) + 5 and "lost" not in outcomes.values()
    reasons = {
        "deep JSON": "read: not_json",
        "deep JSON in a field": "read: not_json",
        "surrogates": "read: not_unicode",
        "one letter": "languages: languages_uncertain",
    }
    assert {name: outcomes[name] for name in reasons} == reasons
    assert {outcomes[f"ordinary {number}"] for number in range(5)} == {"kept"}
