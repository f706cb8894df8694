"""Make the golden texts of GLM-4.5's chat template, which is not kept here.

    python tests/golden/make_glm_chats.py chat_template.jinja

The template is that of huggingface.co/zai-org/GLM-4.5 (MIT), as public logs of servers that load it print it; its hash
is that of the text with one newline at the end. GLM-4.6's (llama.cpp, models/templates) gives the same texts. It is
rendered by Jinja with the settings of transformers (trim_blocks, lstrip_blocks, tojson without escapes), and by the
sandbox of this project, which must give the same.
"""

import datetime
import hashlib
import importlib.metadata
import json
import sys
from pathlib import Path

from glm_chats import GLM_CHATS
from glm_chats import GLM_SETTINGS
from glm_chats import GLM_TOOLS
from jinja2.sandbox import ImmutableSandboxedEnvironment

HERE = Path(__file__).parent


def main(path: Path) -> None:
    """Write glm_chats.json and the entry of provenance.json."""
    sys.path.insert(0, str(HERE.parents[1]))
    from jaxrl_llm.models.chat_template import render_chat

    source = path.read_text(encoding="utf-8")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, ensure_ascii=False: json.dumps(value, ensure_ascii=ensure_ascii)
    template = environment.from_string(source)
    texts, differ = {}, []
    for name, messages in GLM_CHATS.items():
        for listed, thinking, generation in GLM_SETTINGS:
            given = {"tools": GLM_TOOLS[listed], "add_generation_prompt": generation, "messages": messages}
            text = template.render(**given, enable_thinking=thinking)
            if thinking and template.render(**given) != text:
                raise SystemExit(f"{name}: enable_thinking=True is not what the template does by itself")
            if render_chat(source, **given, enable_thinking=thinking) != text:
                differ.append(name)
            texts[f"{name} | {listed} | {thinking} | {generation}"] = text
    lines = [f"{json.dumps(key, ensure_ascii=False)}: {json.dumps(text)}" for key, text in texts.items()]
    (HERE / "glm_chats.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    provenance = HERE / "provenance.json"
    content = json.loads(provenance.read_text(encoding="utf-8"))
    content["glm_chats"] = {
        "command": "python tests/golden/make_glm_chats.py chat_template.jinja",
        "date": datetime.date.today().isoformat(),
        "packages": {"jinja2": importlib.metadata.version("jinja2")},
        "template": "chat_template.jinja of zai-org/GLM-4.5 (MIT)",
        "template_sha256": hashlib.sha256(source.encode()).hexdigest(),
        "distance_of_this_project": {"texts that our sandbox renders otherwise": differ},
    }
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False)
    provenance.write_text(text + "\n", encoding="utf-8")
    print(len(texts), "texts;", len(differ), "differ")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
