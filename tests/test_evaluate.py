import json

from llama3_jax.evaluate import needles_of_run


def test_needles_look_as_those_of_the_run(tmp_path):
    look = dict(
        statement=" {key}:{value}", keys=[1, 2], key_words=["a", "b"], value_words=["c", "d"]
    )
    needle = look | dict(haystack="elsewhere", lengths=[64], depths=3)
    (tmp_path / "config.json").write_text(json.dumps({"evaluation": {"needle": needle}}))
    for folder in ("", "averaged", "checkpoints/10"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        assert needles_of_run(tmp_path / folder) == look
    for config in ({"evaluation": None}, {"evaluation": {"needle": None}}, {}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert needles_of_run(tmp_path) == {}
    (tmp_path / "config.json").unlink()
    assert needles_of_run(tmp_path) == {}
