"""What `helm test` runs in a pod: the gateway is ready, lists models, and answers when a model is named."""

import json
import os
import pathlib
import sys
import urllib.error
import urllib.request

file = pathlib.Path(os.environ["KEY_FILE"])
key = file.read_text().strip() if file.is_file() else ""
headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}


def ask(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(os.environ["GATEWAY"] + path, data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        sys.exit(f"{path}: {error.code} {error.read().decode(errors='replace')}")


print("ready:", ask("/readyz")["reason"])
models = [model["id"] for model in ask("/v1/models")["data"]]
print("models:", ", ".join(models) or "none yet")
if wanted := os.environ["MODEL"]:
    messages = [{"role": "user", "content": "Say hello."}]
    answer = ask("/v1/chat/completions", {"model": wanted, "messages": messages, "max_tokens": 8})
    print("answer:", answer["choices"][0]["message"]["content"])
