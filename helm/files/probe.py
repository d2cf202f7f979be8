"""Asks a Tandem or Ray process on this machine whether it is well: 0 when it is, else 1 and one line that says why.

Runs as the probes of the chart's pods and as its test: standard library only, so that it starts in a moment.
  probe.py raylet --port 52365     this node's Ray answers
  probe.py head --port 8265        the head's state service answers
  probe.py canary --port 8000      every kind of worker is there, and a prompt of one word gets a token
With --wait-s it asks again until all is well, for so long.
"""

import argparse
import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request

PATHS = {"raylet": "/api/local_raylet_healthz", "head": "/api/gcs_healthz"}
PAUSE_S = 2.0


def main(arguments=None):
    options = _options(arguments)
    deadline_s = time.monotonic() + options.wait_s
    while complaint := _complaint(options):
        if time.monotonic() + PAUSE_S > deadline_s:
            print(complaint, file=sys.stderr)
            return 1
        time.sleep(PAUSE_S)
    return 0


def _complaint(options):
    """What is wrong, in one line; empty when all is well."""
    url = options.url or f"http://127.0.0.1:{options.port}"
    try:
        if options.what == "canary":
            print(canary(url, _first_line(options.api_key_file), options.timeout_s))
        else:
            token = os.environ.get("RAY_AUTH_TOKEN", "")
            answer = _ask(url + PATHS[options.what], token, options.timeout_s)
            if b"success" not in answer:
                raise OSError(f"{options.what} answered {answer[:200]!r}")
    except urllib.error.HTTPError as error:
        return f"{error.url} answered {error.code}: {error.read()[:300].decode(errors='replace')}"
    except (OSError, ValueError, KeyError, IndexError, http.client.HTTPException) as error:
        return f"{url}: {error}"
    return ""


def canary(url, api_key, timeout_s):
    """One greedy token for a short prompt, of whatever model is served. Raises OSError, or ValueError for an answer
    without tokens.
    """
    _ask(f"{url}/ready", "", timeout_s)
    model = json.loads(_ask(f"{url}/v1/models", api_key, timeout_s))["data"][0]["id"]
    body = {"model": model, "prompt": "Hello", "max_tokens": 1, "temperature": 0, "ignore_eos": True}
    answer = json.loads(_ask(f"{url}/v1/completions", api_key, timeout_s, body))
    if answer["usage"]["completion_tokens"] != 1:
        raise ValueError(f"the canary got {answer['usage']} and no token")
    return f"{model} answers"


def _ask(url, token, timeout_s, body=None):
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {token}"} if token else {})
    request = urllib.request.Request(url, json.dumps(body).encode() if body else None, headers)
    with urllib.request.urlopen(request, timeout=timeout_s) as response:
        return response.read()


def _first_line(path):
    if not path:
        return ""
    with open(path, encoding="utf-8") as file:
        return file.readline().strip()


def _options(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*PATHS, "canary"])
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--url", help="instead of a port of this machine")
    parser.add_argument("--api-key-file")
    parser.add_argument("--timeout-s", type=float, default=55.0, help="of each request")
    parser.add_argument("--wait-s", type=float, default=0.0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
