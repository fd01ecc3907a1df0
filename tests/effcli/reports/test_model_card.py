from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import yaml

from effcli.recipes import from_mapping
from effcli.reports.model_card import model_card, quoted_sections, split_card

from . import optimize_samples, samples

ORIGINAL = """---
license: apache-2.0
language:
- en
pipeline_tag: text-generation
base_model:
- someone/else
---
# A model

Fine words.

## License

[Apache 2.0](https://www.apache.org/licenses/LICENSE-2.0)

### Sublicences
of the tokenizer

## Use
anything

## Citation
```bash
# no heading: inside code
@misc{x}
```
"""


def card(report: Any = None, **given: Any) -> tuple[dict[str, Any], str]:
    settings = {"licence": "Apache-2.0", "base_model": "someone/model", "original_card": ORIGINAL, **given}
    text = model_card((report or optimize_samples.optimized()).to_dict(), **settings)
    assert text.startswith("---\n")
    head, body = text[4:].split("\n---\n", 1)
    return yaml.safe_load(head), body


def test_the_front_matter_is_what_the_hub_reads() -> None:
    front, _ = card()
    assert front["license"] == "apache-2.0"
    assert front["base_model"] == ["someone/model"]  # not the original's own base
    assert front["base_model_relation"] == "quantized"
    assert front["library_name"] == "transformers"
    assert front["language"] == ["en"] and front["pipeline_tag"] == "text-generation"
    assert {"effcli", "quantize", "w4a16", "gptq", "compressed-tensors"} <= set(front["tags"])
    assert front["quantization"] == {"scheme": "w4a16", "algorithm": "gptq", "bits_per_parameter": 5.85}


def test_the_hub_s_own_library_reads_it() -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    text = model_card(
        optimize_samples.optimized().to_dict(), licence=None, base_model="someone/model", original_card=ORIGINAL
    )
    data = huggingface_hub.ModelCard(text).data
    assert (data.license, data.base_model, data.library_name) == ("apache-2.0", ["someone/model"], "transformers")


def test_the_body_says_what_changed_how_to_load_and_how_to_repeat() -> None:
    _, body = card()
    assert "**Gained: decode 2.14× as fast" in body
    assert "| weights on disk | 269 MB | 98.4 MB |" in body
    assert 'effcli.load("out")' in body and 'AutoModelForCausalLM.from_pretrained("out")' in body
    assert "vllm serve out" in body
    recipe = re.search(r"```yaml\n(.*?)```", body, re.S)
    assert recipe and from_mapping(yaml.safe_load(recipe[1])) == from_mapping(optimize_samples.RECIPE)
    assert "is under: apache-2.0" in body
    assert "[Apache 2.0](https://www.apache.org/licenses/LICENSE-2.0)" in body and "of the tokenizer" in body
    assert "@misc{x}" in body and "Fine words" not in body and "\nanything" not in body


@pytest.mark.parametrize(
    ("licence", "original", "expected"),
    [
        (None, ORIGINAL, {"license": "apache-2.0"}),
        ("MIT", ORIGINAL, {"license": "mit"}),
        ("My Own Licence 1.0", "", {"license": "other", "license_name": "My Own Licence 1.0"}),
        (
            "other",
            "---\nlicense: other\nlicense_name: strange\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "strange", "license_link": "LICENSE"},
        ),
        (None, "", {"license": "unknown"}),
        (None, "---\nlicense: [1, 2]\n---\n", {"license": "unknown"}),
    ],
)
def test_the_licence_is_carried_over(licence: str | None, original: str, expected: dict[str, str]) -> None:
    front, body = card(licence=licence, original_card=original)
    assert {key: value for key, value in front.items() if key.startswith("license")} == expected
    assert ("is not recorded" in body) == (expected["license"] == "unknown")


def test_where_a_user_keeps_files_is_not_published() -> None:
    report = optimize_samples.optimized()
    report = replace(
        report, source={**report.source, "spec": "/home/someone/secret/model"}, output="/home/someone/secret/out"
    )
    front, body = card(report, base_model=None)
    assert "secret" not in str(front) and "secret" not in body
    assert "base_model" not in front and "effcli optimize model --recipe" in body
    assert "base_model" not in card(report, base_model="./local/path/x")[0]


def test_a_hostile_report_and_card_stay_text() -> None:
    text = samples.HOSTILE
    original = f'---\nlicense: "x"\n---\n## License {text}\n````\n{text}\n<script>alert(3)</script>\n'
    front, body = card(optimize_samples.hostile(), licence=text, base_model=text, original_card=original)
    assert "base_model" not in front
    assert "\x1b" not in body
    outside = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", body, flags=re.M | re.S)
    assert "<script" not in outside and "<img" not in outside
    assert "alert(3)" in body and "alert(3)" not in outside


def test_partial_reports_have_a_card_too() -> None:
    front, body = card(optimize_samples.partial(), licence=None, base_model=None, original_card=None)
    assert "Not measured: the model has no tokenizer." in body
    assert "vllm" not in body  # no pass is recorded, so nothing says that it can read the folder
    assert model_card({}, licence=None, base_model=None, original_card=None)


@pytest.mark.parametrize(
    "text", ["", "# no front matter", "---\nlicense: mit\n", "---\n[: bad\n---\nbody", "---\n- a\n---\n"]
)
def test_a_card_without_a_readable_front_matter_gives_none(text: str) -> None:
    assert split_card(text)[0] == {}


def test_quotes_are_cut() -> None:
    quoted = quoted_sections("# License\n" + "line\n" * 500)
    assert len(quoted) == 61 and quoted[-1] == "…"
