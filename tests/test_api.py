"""A model behind an API, played by a server on this machine that also refuses, stalls, breaks off and talks nonsense."""
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

import eval as evaluation

GOOD = '{"dealer": "7", "hand": ["9", "5"], "thoughts": "", "action": "stand"}'


def completion(text, finish_reason="stop"):
    """What an endpoint replies: (status, body)."""
    choice = {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": text}}
    return 200, json.dumps({"id": "", "created": 0, "model": "m", "choices": [choice]})


@pytest.fixture
def server(monkeypatch):
    """A chat completion endpoint: `replies` holds what it does next, GOOD after that; `asked` the bodies of all requests."""
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            web.asked.append((self.path, self.headers["Authorization"], body))
            with web.lock:
                reply = web.replies.pop(0) if web.replies else GOOD
            if callable(reply):
                return reply(self)
            status, content = reply if isinstance(reply, tuple) else completion(reply)
            data = content.encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.asked, web.replies, web.lock, web.daemon_threads = [], [], threading.Lock(), True
    web.base = f"http://127.0.0.1:{web.server_port}/v1"
    thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setenv("API_KEY", "sk-very-secret")
    yield web
    web.shutdown()
    web.server_close()


def model(server, tmp_path, **kwargs):
    return evaluation.ApiModel(server.base, "m", "sk-very-secret", tmp_path / "cache.jsonl", wait=waits.append, **kwargs)


waits = []
PICTURE = np.zeros((1, 300, 300, 3), np.uint8)


def test_a_picture_and_a_prompt_are_sent_and_the_text_comes_back(server, tmp_path):
    answer, = model(server, tmp_path).act(PICTURE, ["what is this?"])
    assert answer.text == GOOD
    (path, key, body), = server.asked
    assert path == "/v1/chat/completions" and key == "Bearer sk-very-secret" and body["model"] == "m" and body["max_tokens"] == 512
    picture, text = body["messages"][0]["content"]
    assert picture["image_url"]["url"].startswith("data:image/png;base64,iVBOR") and text["text"] == "what is this?"


def hang(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "10")
    handler.end_headers()
    handler.wfile.flush()
    hang.over.wait(5)


def drop(handler):
    handler.close_connection = True


@pytest.mark.parametrize("trouble", [(408, "too slow"), (429, "slow down"), (500, "oops"), (503, ""), drop])
def test_what_may_pass_is_asked_again_after_longer_and_longer_waits(server, tmp_path, trouble):
    waits.clear()
    server.replies = [trouble, trouble, GOOD]
    api = model(server, tmp_path)
    assert api.act(PICTURE, ["?"])[0].text == GOOD and waits == [1, 2] and api.requests == 3


def test_a_server_that_hangs_is_given_up(server, tmp_path):
    hang.over = threading.Event()
    server.replies = [hang] * 6
    with pytest.raises(evaluation.ApiError, match="Timeout"):
        model(server, tmp_path, timeout=0.1).act(PICTURE, ["?"])
    hang.over.set()


def endless(handler):
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    try:
        while True:
            handler.wfile.write(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
    except OSError:
        endless.stopped.set()


@pytest.mark.parametrize("reply", [(200, "<html>no JSON"), (200, '{"choices": []}'), (200, "[1, 2]"), (200, '{"choices": [{"message": {"content": null}}]}'),
                                   (200, '{"choices": [{"mess'), (200, "[" * 100_000), endless])
def test_nonsense_is_an_empty_answer(server, tmp_path, reply):
    endless.stopped = threading.Event()
    server.replies = [reply]
    assert model(server, tmp_path).act(PICTURE, ["?"])[0].text == ""
    assert reply is not endless or endless.stopped.wait(5)


def test_a_huge_answer_is_cut(server, tmp_path):
    server.replies = ["x" * 500_000]
    assert len(model(server, tmp_path).act(PICTURE, ["?"])[0].text) == 10_000


def test_the_cache_pays_once_and_keeps_several_samples_of_one_state(server, tmp_path):
    server.replies = ["one", "two"]
    api = model(server, tmp_path)
    first = [api.act(PICTURE, ["?"])[0].text for _ in range(2)]
    assert first == ["one", "two"] and api.requests == 2
    with (tmp_path / "cache.jsonl").open("a") as file:
        file.write('{"torn')
    again = model(server, tmp_path)
    assert [again.act(PICTURE, ["?"])[0].text for _ in range(3)] == ["one", "two", GOOD] and again.requests == 1
    last = model(server, tmp_path)
    assert [last.act(PICTURE, ["?"])[0].text for _ in range(3)] == ["one", "two", GOOD] and last.requests == 0


def command(monkeypatch, server, tmp_path, *flags):
    monkeypatch.setattr("sys.argv", ["eval.py", "--env", "blackjack", "--api-base", server.base, "--api-model", "m", "--episodes", "6", "--num-envs", "3",
                                     "--cache", str(tmp_path / "cache.jsonl"), *flags])
    evaluation.main()


def test_an_evaluation_and_the_same_from_the_cache(server, tmp_path, monkeypatch, capsys):
    server.replies = ["nonsense", "\x1b[2J"]
    command(monkeypatch, server, tmp_path, "--json")
    first = json.loads(capsys.readouterr().out)
    assert first["policy"] == "api:m" and first["episodes"] == 6 and first["requests"] == len(server.asked) and first["illegal_rate"] > 0
    command(monkeypatch, server, tmp_path, "--json")
    second = json.loads(capsys.readouterr().out)
    assert second == first | {"requests": 0, "seconds": second["seconds"]}


@pytest.mark.parametrize("reply, flags, words", [
    ((401, 'bad key "sk-very-secret" \x1b[2J'), (), "401"), ((404, "no such model"), (), "no such model"), (GOOD, ("--max-requests", "2"), "--max-requests 2")])
def test_what_cannot_go_on_gives_one_line_without_the_key(server, tmp_path, monkeypatch, capsys, reply, flags, words):
    server.replies = [reply] * 3
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, server, tmp_path, *flags)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1 and words in captured.err
    assert "secret" not in captured.err + (tmp_path / "cache.jsonl").read_text() and "\x1b" not in captured.err
    assert len(server.asked) <= 3


def test_an_answer_cut_off_before_its_first_word_is_asked_again_by_the_next_process(server, tmp_path):
    server.replies = [completion("", "length"), completion('{"action": "st', "length")]
    first = model(server, tmp_path, max_tokens=7)
    assert [first.act(PICTURE, [prompt])[0].text for prompt in "ab"] == ["", '{"action": "st'] and first.num_cut_off == 2
    assert [body["max_tokens"] for _, _, body in server.asked] == [7, 7]
    again = model(server, tmp_path)
    assert [again.act(PICTURE, [prompt])[0].text for prompt in "ab"] == [GOOD, '{"action": "st']
    assert again.requests == 1 and again.num_cut_off == 1 and again.num_answers == 2


def test_answers_that_were_cut_off_are_counted_in_a_warning(server, tmp_path, monkeypatch, capsys):
    server.replies = [completion("", "length"), completion('{"action": "st', "length")]
    command(monkeypatch, server, tmp_path, "--max-tokens", "7")
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("2 of ") and "cut off at --max-tokens 7" in captured.err
    assert "api:m" in captured.out
    command(monkeypatch, server, tmp_path, "--json")
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["cut_off"] == 1 and result["requests"] >= 1 and captured.err == ""


@pytest.mark.parametrize("content", ["no JSON\n", "[1, 2]\n", "3\n", "no line"])
def test_a_file_that_is_no_cache_is_refused_and_left_alone(server, tmp_path, monkeypatch, capsys, content):
    (tmp_path / "cache.jsonl").write_text(content)
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, server, tmp_path)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cache.jsonl" in error and (tmp_path / "cache.jsonl").read_text() == content


@pytest.mark.parametrize("address", ["http://", "https://host:port/v1", "http:///v1", "http://\n"])
def test_an_address_that_is_none_gives_one_line(server, tmp_path, monkeypatch, capsys, address):
    server.base = address
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, server, tmp_path)
    assert capsys.readouterr().err.count("\n") == 1 and not server.asked


def test_a_name_that_the_terminal_cannot_show(server, tmp_path):
    done = subprocess.run([sys.executable, evaluation.__file__, "--env", "blackjack", "--api-base", server.base, "--api-model", "\u6a21", "--episodes", "2",
                           "--cache", str(tmp_path / "cache.jsonl")], capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and b"api:\\u6a21" in done.stdout and done.stderr == b""
