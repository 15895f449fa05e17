"""lid.176 names languages by their script and words; code does not hide them."""

import pytest

from llama3_jax.curation.languages import LanguagesConfig, known_languages, languages, prose, sample
from llama3_jax.errors import UserError
from tests.curation.frames import document, run

SENTENCES = {
    "en": "The committee will publish its report on the state of the rivers next week.",
    "de": "Der Ausschuss wird seinen Bericht über den Zustand der Flüsse nächste Woche veröffentlichen.",
    "zh": "委员会将于下周公布有关河流状况的报告，并听取居民的意见。",
    "ja": "委員会は来週、川の状態についての報告書を公表する予定です。",
    "ko": "위원회는 다음 주에 강의 상태에 관한 보고서를 발표할 예정이다.",
    "ru": "Комитет опубликует свой доклад о состоянии рек на следующей неделе.",
    "hi": "समिति अगले सप्ताह नदियों की स्थिति पर अपनी रिपोर्ट प्रकाशित करेगी।",
    "th": "คณะกรรมการจะเผยแพร่รายงานเกี่ยวกับสภาพของแม่น้ำในสัปดาห์หน้า",
    "ar": "ستنشر اللجنة تقريرها عن حالة الأنهار في الأسبوع المقبل.",
    "el": "Η επιτροπή θα δημοσιεύσει την έκθεσή της για την κατάσταση των ποταμών.",
}
CODE = "\n".join(f"    buf[i{n}] = (x{n} << {n}) | f_{n}(&p->q{n}, 0x{n:04x});" for n in range(60))


def test_the_model_knows_176_languages():
    assert len(known_languages()) == 176


def test_languages_and_reasons(tmp_path):
    rows = [document(text=text, title=code, language="") for code, text in SENTENCES.items()]
    rows += [
        document(text="", title="languages_unknown"),
        document(text=" \n\t", title="languages_unknown"),
        document(text="0x1f 7b3e 99a0 ffff 0001", title="languages_uncertain"),
        document(text=SENTENCES["en"].upper(), title="en"),
        document(text=f"{SENTENCES['en']}\n\n{CODE}\n\n{SENTENCES['en']}", title="en"),
    ]
    out = run(languages, LanguagesConfig(), rows, tmp_path, files=2)
    for row in rows:
        got = out[row["doc"]]
        assert row["title"] in (got["language"], got["reason"])
        assert (got["reason"] is None) == (len(row["title"]) == 2)
        assert 0 <= got["languages_score"] <= 1


def test_thresholds_and_wanted_languages(tmp_path):
    rows = [document(text=text, title=code) for code, text in SENTENCES.items()]
    config = LanguagesConfig(
        keep=("en", "de", "ru"), thresholds={"de": 1.0, "ru": 0.0}, threshold=0.2
    )
    out = run(languages, config, rows, tmp_path)
    reasons = {row["title"]: row["reason"] for row in out.values()}
    expected = {"en": None, "ru": None, "de": "languages_uncertain"}
    assert reasons == {code: expected.get(code, "languages_unwanted") for code in SENTENCES}
    for wrong in ({"keep": ("english",)}, {"thresholds": {"xx": 0.5}}):
        with pytest.raises(UserError, match="english|xx"):
            languages(None, LanguagesConfig(**wrong), tmp_path)


def test_code_is_exempt_where_its_source_is(tmp_path):
    code = "0x1f 7b3e 99a0 ffff 0001"
    rows = [
        document(text=text, source=source)
        for text, source in ((code, "code"), (code, "web"), ("", "code"))
    ]
    out = run(languages, LanguagesConfig(exempt_sources=("code",)), rows, tmp_path)
    reasons = [out[row["doc"]]["reason"] for row in rows]
    assert reasons == [None, "languages_uncertain", "languages_unknown"]
    assert out[rows[0]["doc"]]["language"] == ""


def test_samples_reach_from_the_first_character_to_the_last():
    text = "".join(chr(0x4E00 + number) for number in range(3000))
    pieces = sample(text, 4, 10).split(" ")
    assert [len(piece) for piece in pieces] == [10] * 4
    assert pieces[0] == text[:10] and pieces[-1] == text[-10:]
    assert sample("a\n b", 4, 10) == "a b"
    assert prose(CODE) == "" and prose(SENTENCES["hi"] * 2) == SENTENCES["hi"] * 2
