"""A fake vLLM server with the endpoints that rollout/vllm_api.py uses, and with planted failures.

Its "model" is a number in the file `value` of the loaded folder, or else a real model of
transformers. As a program it accepts vLLM's arguments and can be used as `rollout.vllm.python`.
"""

import base64
import json
import math
import os
import random
import shutil
import socket
import struct
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

EOS = 3
UNLOADED = -9.0
"""Log-prob of every token under the initial weights."""

BASE_MODEL = "the base model"

UNSEEDED = 5
"""Seed of responses to requests without one."""

_LOADING = threading.Lock()
"""Lock for loading a model. transformers patches itself and torch meanwhile, and two concurrent
loads would leave the patches in place."""


def response_to(
    prompt: Sequence[int], seed: int, limit: int, stop_ids: Sequence[int] = (EOS,)
) -> list[int]:
    """Return the fake response to a prompt and seed. Most responses end with one of stop_ids."""
    length = seed % (limit + limit // 2) + 1
    others = [id for id in range(10, 210) if id not in stop_ids]
    ids = [others[(sum(prompt) + seed + 7 * i) % len(others)] for i in range(min(length, limit))]
    if length <= limit:
        ids[-1] = stop_ids[0]
    return ids


def _choose_port() -> int:
    """Choose a free port that remains free while the server is down.

    It is below 32,768, where the ports begin that the system assigns to connections.
    """
    for port in random.sample(range(20_000, 32_000), 100):
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port from 20,000 to 32,000")


class Refused(Exception):
    """A request is answered with a status code and a text."""


class FakeVllm:
    """The server, in threads of this process.

    Attributes that a test may set:
        faults: faults of the next responses, in order; "" is no fault. See `_generate`.
        always: fault of all later responses.
        hold: event; responses wait while it is cleared.
        loads: whether it loads new weights. If not, it still reports the new version.
        processed: whether log-probs are computed after the sampling settings.
        damaged: name of a tensor that workers receive with a flipped bit.
        lost: name of a tensor that workers do not receive.
        greedy: whether it responds with the loaded model's likeliest tokens.
        num_workers: world size that the server reports.
        sent_value: value of the "model" after a weight transfer without data.
        architecture: HF folder whose config.json describes the tensors of a weight transfer.
        base: HF folder of the model under an adapter.
        fails_after: number of buckets of weight transfers after which the server fails once.
    Attributes that a test may read:
        responses: number of correct responses.
        most_at_a_time: largest number of concurrent requests.
        loaded: loaded folders, in order.
        adapters: value and model of each loaded adapter, by name.
        joined: communicators, in order.
        received_buckets: number of buckets in all transfers.
        sleeps: levels at which it was put to sleep, in order.
    """

    def __init__(
        self,
        *,
        key: str | None = None,
        version: str = "0.32.0",
        host: str = "127.0.0.1",
        port: int = 0,
    ):
        self.key, self.version = key, version
        self.host, self.port = host, port or _choose_port()
        self.faults: list[str] = []
        self.always: str | None = None
        self.hold = threading.Event()
        self.hold.set()
        self.loads, self.processed, self.greedy = True, False, False
        self.damaged = self.lost = ""
        self.responses = self.most_at_a_time = self._at_a_time = 0
        self.loaded: list[Path] = []
        self.num_workers, self.sent_value = 1, UNLOADED
        self.joined: list[dict[str, Any]] = []
        self.fails_after, self.received_buckets = -1, 0
        self.sleeps: list[int] = []
        self.architecture: Path | None = None
        self.base: Path | None = None
        self._lock = threading.Lock()
        self.start()

    def start(self) -> None:
        """Start serving, with the initial weights."""
        self.label, self.is_paused, self.value, self.model = "default", False, UNLOADED, None
        self.digests: dict[str, str] | None = None
        self.adapters: dict[str, tuple[float, Any]] = {}
        self._is_dying = self.is_asleep = False
        self.senders: tuple[str, dict[int, list[socket.socket]]] | None = None
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                fake._answer(self, {})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                fake._answer(self, json.loads(body or b"{}"))

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, *_: Any) -> None:
                """Ignore errors: connections are broken on purpose."""

        self._http = Server((self.host, self.port), Handler)
        self._connections: list[socket.socket] = []
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def die(self) -> None:
        """Break every connection, and accept no more."""
        self._is_dying = True
        self._http.shutdown()
        self._http.server_close()
        for connection in self._connections:
            # Reset connections, as when a process is killed.
            linger = struct.pack("ii", 1, 0)
            try:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def _answer(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        self._connections.append(handler.connection)
        if self._is_dying:
            return self._hang_up(handler)
        path, _, query = handler.path.partition("?")
        if self.key and handler.headers.get("Authorization") != f"Bearer {self.key}":
            return self._reply(handler, 401, {"error": "unauthorized"})
        try:
            if path == "/inference/v1/generate":
                if "prompt_logprobs" in body["sampling_params"]:
                    return self._reply(handler, 200, self._score(body))
                return self._generate(handler, body)
            return self._reply(handler, 200, self._control(path, query, body))
        except Refused as refused:
            status, text = refused.args
            return self._reply(handler, status, {"error": {"message": text}})
        except RuntimeError as error:
            return self._reply(handler, 500, {"error": str(error)})

    def _control(self, path: str, query: str, body: dict[str, Any]) -> dict[str, Any] | bytes:
        if path == "/version":
            return {"version": self.version}
        if path == "/weight_info":
            return {"weight_version": self.label}
        if path in ("/pause", "/resume"):
            self.is_paused = path == "/pause"
        if path == "/update_weight_version":
            assert self.is_paused
            self.label = body["new_version"]
        if path == "/get_world_size":
            return {"world_size": self.num_workers}
        if path == "/init_weight_transfer_engine":
            self._join(body["init_info"])
        if path == "/start_weight_update":
            assert self.is_paused
            self.received: dict[str, Any] = {}
        if path == "/update_weights":
            self._receive(body["update_info"])
        if path == "/finish_weight_update":
            self._load_received()
        if path == "/sleep":
            level = int(query.removeprefix("level=").removesuffix("&mode=abort"))
            self.is_asleep = self.is_paused = True
            if level == 2:
                self.value, self.model, self.adapters, self.base = UNLOADED, None, {}, None
            self.sleeps.append(level)
        if path == "/wake_up":
            self.is_asleep = self.is_paused = False
        if path == "/collective_rpc":
            assert self.is_paused
            return {"results": self._on_workers(body["method"], body["kwargs"])}
        if path == "/v1/models":
            cards = [{"id": BASE_MODEL, "parent": None}]
            return {"data": cards + [{"id": n, "parent": BASE_MODEL} for n in self.adapters]}
        if path.endswith("_lora_adapter"):
            assert self.is_paused and not self.is_asleep
            return self._change_adapters(path, body)
        return {"success": True}

    def _change_adapters(self, path: str, body: dict[str, Any]) -> bytes:
        name = body["lora_name"]
        if path == "/v1/unload_lora_adapter":
            if name not in self.adapters:
                raise Refused(404, f"The lora adapter '{name}' cannot be found.")
            del self.adapters[name]
        else:
            assert path == "/v1/load_lora_adapter"
            if name in self.adapters:
                raise Refused(400, f"The lora adapter '{name}' has already been loaded.")
            folder = Path(body["lora_path"])
            self.loaded.append(folder)
            self.adapters[name] = self._load_adapter(folder) if self.loads else (UNLOADED, None)
        return b"Success"

    def _load_adapter(self, folder: Path) -> tuple[float, Any]:
        if (folder / "value").exists():
            return float((folder / "value").read_text()), None
        import torch
        from safetensors.torch import load_file, save_file
        from transformers import AutoModelForCausalLM

        from tests.support.tiny_adapters import read_adapter

        assert self.base
        pairs, scale = read_adapter(folder)
        tensors = load_file(self.base / "model.safetensors")
        for name, (a, b) in pairs.items():
            tensors[f"{name}.weight"] += (scale * b @ a).float()
        merged = self.base.with_name(f"merged-{self.port}")
        shutil.copytree(self.base, merged, dirs_exist_ok=True)
        save_file(tensors, merged / "model.safetensors", {"format": "pt"})
        with _LOADING:
            return UNLOADED, AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)

    def _weights(self, body: dict[str, Any]) -> tuple[float, Any]:
        """Return the value and the model that a request is answered with."""
        name = body.get("model")
        if name is None:
            return self.value, self.model
        if name not in self.adapters:
            raise Refused(404, f"The model `{name}` does not exist.")
        return self.adapters[name]

    def _on_workers(self, method: str, arguments: dict[str, Any]) -> list[Any]:
        result: Any = None
        match method:
            case "aropd_reload_weights":
                folder = Path(arguments["weights_path"])
                self.loaded.append(folder)
                if self.loads:
                    self._load(folder)
            case "aropd_keep_sender":
                if self.senders is None or self.senders[0] != arguments["name"]:
                    self.senders = (arguments["name"], {})
                self.senders[1][arguments["sender"]] = self._links
            case "aropd_choose_sender":
                assert self.senders is not None
                self._links = self.senders[1][arguments["sender"]]
            case "aropd_senders_name":
                result = self.senders and self.senders[0]
            case "aropd_note_digests":
                self.digests = {}
            case "aropd_noted_digests":
                result, self.digests = self.digests, None
                assert result is not None
        return [result] * self.num_workers

    def _note(self, folder: Path | None = None) -> None:
        """Note digests of the workers' new weights: a folder's tensors, or the value as one."""
        if self.digests is None:
            return
        import torch
        from safetensors.torch import load_file

        from aropd_mcore.rollout.vllm_side.aropd_worker import digest

        tensors = {} if folder else {"value": torch.tensor([self.value])}
        for path in folder.glob("*.safetensors") if folder else ():
            tensors |= load_file(path)
        tensors.pop(self.lost, None)
        if self.damaged in tensors:
            tensors[self.damaged].view(torch.uint8).view(-1)[-1] ^= 1
        self.digests |= {name: digest(tensor) for name, tensor in tensors.items()}

    def _join(self, info: dict[str, Any]) -> None:
        """Connect each worker with a sender, if the id is the address of one (`SocketLink`)."""
        self.joined.append(info)
        self._links: list[socket.socket] = []
        address = info["nccl_unique_id_b64"]
        if address == "an id":
            return
        host, port = base64.b64decode(address).decode().split(":")
        for worker in range(self.num_workers):
            link = socket.create_connection((host, int(port)))
            link.sendall(struct.pack("<I", info["rank_offset"] + worker))
            self._links.append(link)

    def _receive(self, info: dict[str, Any]) -> None:
        """Receive tensors in buckets, which are cut as by vLLM's packed_nccl_broadcast_consumer."""
        assert self.is_paused
        if not self._links:
            return
        import torch

        limit = self.joined[-1]["packed_buffer_size_bytes"]
        entries = list(zip(info["names"], info["dtype_names"], info["shapes"], strict=True))
        while entries:
            bucket, size = [], 0
            while entries and size <= limit:
                name, dtype, shape = entries.pop(0)
                num_bytes = math.prod(shape) * getattr(torch, dtype).itemsize
                bucket.append((name, getattr(torch, dtype), shape, num_bytes))
                size += num_bytes
            if self.received_buckets == self.fails_after:
                self.fails_after = -1
                raise RuntimeError("EngineCore died")
            self.received_buckets += 1
            for link in self._links:
                data = _read_bucket(link)
                assert len(data) == size, (len(data), size)
                start = 0
                for name, dtype, shape, num_bytes in bucket:
                    part = torch.frombuffer(data[start : start + num_bytes], dtype=dtype)
                    self.received[name], start = part.view(shape).clone(), start + num_bytes

    def _load_received(self) -> None:
        if not self.received:
            self.value = self.sent_value
            return self._note()
        import torch
        from safetensors.torch import save_file
        from transformers import AutoModelForCausalLM

        from aropd_mcore.rollout.vllm_side.aropd_worker import digest

        assert self.architecture
        if self.digests is not None:
            self.digests |= {name: digest(tensor) for name, tensor in self.received.items()}
        folder = self.architecture.with_name(f"received-{self.port}")
        shutil.copytree(self.architecture, folder, dirs_exist_ok=True)
        save_file(self.received, folder / "model.safetensors", {"format": "pt"})
        with _LOADING:
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return None

    def _load(self, folder: Path) -> None:
        if (folder / "value").exists():
            self.value = float((folder / "value").read_text())
            self._note()
        else:
            import torch
            from transformers import AutoModelForCausalLM

            self._note(folder)
            with _LOADING:
                self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def _generate(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        assert not self.is_paused and not self.is_asleep
        _, model = self._weights(body)
        with self._lock:
            if self._is_dying:
                return self._hang_up(handler)
            fault = self.faults.pop(0) if self.faults else self.always
            # die() takes time. Other requests must not get a response meanwhile.
            self._is_dying |= fault in ("die", "restart")
            self._at_a_time += 1
            self.most_at_a_time = max(self.most_at_a_time, self._at_a_time)
        self.hold.wait()
        params = body["sampling_params"]
        limit, stop_ids = params["max_tokens"], params["stop_token_ids"]
        # A faulty response has other tokens, so a test fails if it is used.
        seed = params.get("seed", UNSEEDED) + bool(fault)
        if self.greedy:
            assert params["temperature"] == 0
            ids, logprobs = self._likeliest(model, body["token_ids"], limit, stop_ids)
        else:
            ids = response_to(body["token_ids"], seed, limit, stop_ids)
            logprobs = [-id / 100 for id in ids]
        content = [{"token_id": i, "logprob": v} for i, v in zip(ids, logprobs, strict=True)]
        choice = {
            "token_ids": ids,
            "logprobs": {"content": content},
            "weight_versions": [{"version": self.label, "start": 0, "end": len(ids)}],
        }
        answer: Any = {"choices": [choice]}
        with self._lock:
            self._at_a_time -= 1
        match fault:
            case None | "":
                self.responses += 1
            case "garbage":
                return self._reply(handler, 200, b"<html>bad gateway</html>")
            case "not an object":
                answer = ["unexpected"]
            case "error":
                return self._reply(handler, 500, {"error": {"message": "EngineCore died"}})
            case "none":
                answer["choices"] = []
            case "two":
                answer["choices"] *= 2
            case "fewer":
                choice["token_ids"] = ids = [11]
                choice["logprobs"]["content"] = [{"token_id": 11, "logprob": -1.0}]
            case "beyond its end":
                content = choice["logprobs"]["content"]
                choice["token_ids"] = [EOS, *ids]
                choice["logprobs"]["content"] = [{"token_id": EOS, "logprob": -1.0}, *content]
            case "log-probs of others":
                choice["logprobs"]["content"][0]["token_id"] += 1
            case "no log-prob":
                choice["logprobs"]["content"][-1]["logprob"] = -9999.0
            case "other weights":
                choice["weight_versions"].append({"version": "7-other", "start": 1, "end": 2})
            case "slow":
                time.sleep(3)
            case "hang up":
                return self._hang_up(handler)
            case "die":
                return self.die()
            case "restart":
                self.die()
                return self.start()
            case "exit":
                os._exit(9)
        return self._reply(handler, 200, answer)

    def _likeliest(
        self, model: Any, prompt: Sequence[int], limit: int, stop_ids: Sequence[int]
    ) -> tuple[list[int], list[float]]:
        import torch

        assert model
        ids, logprobs = [], []
        with torch.no_grad():
            while len(ids) < limit and not (ids and ids[-1] in stop_ids):
                logits = model(torch.tensor([[*prompt, *ids]])).logits[0, -1].log_softmax(-1)
                ids.append(int(logits.argmax()))
                logprobs.append(float(logits.max()))
        return ids, logprobs

    def _score(self, body: dict[str, Any]) -> dict[str, Any]:
        [last] = body["sampling_params"]["allowed_token_ids"]
        ids = [*body["token_ids"], last]
        value, model = self._weights(body)
        if model is None:
            logprobs = [value] * (len(ids) - 1)
        else:
            import torch

            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            logprobs = logits[range(len(ids) - 1), ids[1:]].tolist()
        places = [None] + [
            {str(id): {"logprob": value}}
            for id, value in zip(ids[1:-1], logprobs[:-1], strict=True)
        ]
        content = [{"token_id": last, "logprob": 0.0 if self.processed else logprobs[-1]}]
        choice = {"token_ids": [last], "logprobs": {"content": content}}
        return {"choices": [choice], "prompt_logprobs": places}

    def _hang_up(self, handler: BaseHTTPRequestHandler) -> None:
        handler.connection.shutdown(socket.SHUT_RDWR)

    def _reply(self, handler: BaseHTTPRequestHandler, status: int, content: Any) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)


def _read_bucket(link: socket.socket) -> bytearray:
    """Read a message of SocketLink: its length, then its bytes."""

    def read(size: int) -> bytearray:
        data = bytearray()
        while len(data) < size:
            part = link.recv(size - len(data))
            assert part, "the sender has ended"
            data += part
        return data

    return read(struct.unpack("<Q", read(8))[0])


class SocketLink:
    """Link of rollout/vllm_nccl.py over TCP, for tests without a GPU. The id is an address."""

    _listeners: ClassVar[dict[bytes, socket.socket]] = {}

    @classmethod
    def new_id(cls) -> bytes:
        listener = socket.create_server(("127.0.0.1", 0))
        unique_id = f"127.0.0.1:{listener.getsockname()[1]}".encode()
        cls._listeners[unique_id] = listener
        return unique_id

    def __init__(self, unique_id: bytes, num_ranks: int, _device: Any):
        listener = self._listeners.pop(unique_id)
        self._peers: dict[int, socket.socket] = {}
        self._last: threading.Thread | None = None
        while len(self._peers) < num_ranks - 1:
            peer, _ = listener.accept()
            (rank,) = struct.unpack("<I", peer.recv(4))
            self._peers[rank] = peer
        assert sorted(self._peers) == list(range(1, num_ranks))

    def broadcast(self, flat: Any) -> Any:
        data = flat.numpy().tobytes()
        future: Future[None] = Future()

        def send() -> None:
            for peer in self._peers.values():
                peer.sendall(struct.pack("<Q", len(data)) + data)
            future.set_result(None)

        previous, self._last = self._last, threading.Thread(target=send, daemon=True)
        if previous is not None:
            previous.join()
        self._last.start()
        return future.done


def main() -> None:
    """Run like `python -m vllm.entrypoints.openai.api_server`."""
    arguments = dict(zip(sys.argv[1:], sys.argv[2:], strict=False))
    print("arguments", sys.argv[1:], flush=True)
    if "--refuse" in sys.argv:
        sys.exit("unrecognized arguments: --refuse")
    fake = FakeVllm(
        key=os.environ["VLLM_API_KEY"], host=arguments["--host"], port=int(arguments["--port"])
    )
    marker = Path(arguments["--exit-once"]) if "--exit-once" in arguments else None
    if marker and not marker.exists():
        marker.touch()
        fake.faults = ["", "exit"]
    threading.Event().wait()


if __name__ == "__main__":
    main()
