"""Endpoints of vLLM's server: the only module that depends on them.

Written from vLLM 0.32's source and tested against that version (tests/vllm). The endpoint
`/inference/v1/generate` takes token ids and returns token ids, log-probs of the sampled tokens, and
the weight version that produced each token. Weights are loaded by the endpoints of the development
mode (VLLM_SERVER_DEV_MODE, vllm/entrypoints/rl and serve/dev), and adapters by those of
vllm/entrypoints/serve/lora (VLLM_ALLOW_RUNTIME_LORA_UPDATING).
"""

import asyncio
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from aropd_mcore.config import SamplingConfig
from aropd_mcore.convert.tensor_bytes import BUCKET_BYTES, TensorInfo

SUPPORTED_VERSIONS = ((0, 32), (0, 33))
"""First supported version, and first version that has not been tested."""

_NO_LOGPROB = -9999.0
"""Value that vLLM reports for a log-prob that is not finite."""
_RETRIED = (408, 429)
"""Status codes 4xx after which a retry may succeed: timeout, and too many requests."""
_NOT_FOUND = 404


class ServerError(RuntimeError):
    """A request failed; a retry or another server may succeed."""


class RefusedByServer(ServerError):
    """A server refused a request, and would refuse every retry."""


def check_version(text: str) -> None:
    """Raise RefusedByServer unless `text` is a version of SUPPORTED_VERSIONS."""
    first, behind = SUPPORTED_VERSIONS
    match = re.match(r"(\d+)\.(\d+)", text)
    if match is None or not first <= (int(match[1]), int(match[2])) < behind:
        raise RefusedByServer(
            f"it runs vLLM {text}; expected at least {'.'.join(map(str, first))} and below "
            f"{'.'.join(map(str, behind))}"
        )


class Api:
    """Endpoints of one server. Every method raises ServerError, without the server's name."""

    def __init__(self, http: httpx.AsyncClient, url: str, key: str | None, timeout: float):
        """
        Args:
            timeout: longest time for an answer, in seconds.
        """
        self._http = http
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._timeout = timeout

    async def is_healthy(self) -> bool:
        """Return whether the server answers and its engine runs. Only RefusedByServer is raised."""
        try:
            await self._call("GET", "/health", timeout=10.0)
        except RefusedByServer:
            raise
        except ServerError:
            return False
        return True

    async def vllm_version(self) -> str:
        return _text(await self._call("GET", "/version"), "version")

    async def weight_version(self) -> str:
        return _text(await self._call("GET", "/weight_info"), "weight_version")

    async def num_workers(self) -> int:
        """Return the number of processes that hold weights."""
        count = (await self._call("GET", "/get_world_size")).get("world_size")
        if type(count) is not int or count < 1:
            raise ServerError(f"/get_world_size answered {count!r}")
        return count

    async def pause(self) -> None:
        """Schedule nothing until `resume`. Requests in flight are aborted."""
        await self._call("POST", "/pause", params={"mode": "abort"})

    async def resume(self, weight_version: str) -> None:
        """Drop the caches of the old weights and continue under this version."""
        await self._call("POST", "/update_weight_version", json={"new_version": weight_version})
        for _ in range(50):  # blocks of aborted requests are released with a delay
            if (await self._call("POST", "/reset_prefix_cache")).get("success") is True:
                break
            await asyncio.sleep(0.1)
        else:
            raise ServerError("/reset_prefix_cache: no success in 50 attempts")
        await self._call("POST", "/resume")

    async def load_weights(self, folder: Path) -> None:
        """Load an HF folder, which must have this path on the server too. Call `pause` first."""
        await self._on_workers("aropd_reload_weights", weights_path=str(folder))

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Load a PEFT folder, which must have this path on the server too, under a new name.

        Every other adapter is unloaded. Call `pause` first. vLLM's `load_inplace`, which keeps one
        name, is not used: every request would carry it, and vLLM would read the folder again for
        every batch (LRUCacheWorkerLoRAManager.add_adapter).
        """
        models = (await self._call("GET", "/v1/models")).get("data")
        if not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
            raise ServerError(f"/v1/models answered {_brief(models)}; expected a list of models")
        for model in models:
            if model.get("parent") is not None:
                call = {"lora_name": model.get("id")}
                await self._call("POST", "/v1/unload_lora_adapter", json=call, has_answer=False)
        call = {"lora_name": name, "lora_path": str(folder)}
        await self._call("POST", "/v1/load_lora_adapter", json=call, has_answer=False)

    async def note_digests(self) -> None:
        """Make every worker record digests of the tensors that it loads, until `noted_digests`."""
        await self._on_workers("aropd_note_digests")

    async def noted_digests(self) -> list[Mapping[str, str]]:
        """Return each worker's digests by tensor name."""
        results = (await self._on_workers("aropd_noted_digests")).get("results")
        if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
            raise ServerError(f"found {_brief(results)}; expected digests of every worker")
        return results

    async def senders_name(self) -> str | None:
        """Return the name of the communicators that all workers have joined, if they agree."""
        answer = await self._on_workers("aropd_senders_name")
        names = answer.get("results")
        if not isinstance(names, list) or not names:
            raise ServerError(f"found {_brief(names)}; expected a name of every worker")
        return names[0] if all(name == names[0] for name in names) else None

    async def join_sender(
        self, name: str, sender: int, unique_id_base64: str, first_rank: int, num_ranks: int
    ) -> None:
        """Join the communicator of a sender, which is its rank 0.

        Args:
            name: name of the communicators. Those of another name are closed.
            sender: number of the sender.
            first_rank: rank of the first worker.
        """
        info = {
            "nccl_unique_id_b64": unique_id_base64,
            "rank_offset": first_rank,
            "world_size": num_ranks,
            "packed": True,
            "packed_buffer_size_bytes": BUCKET_BYTES,
        }
        await self._call("POST", "/init_weight_transfer_engine", json={"init_info": info})
        await self._on_workers("aropd_keep_sender", name=name, sender=sender)

    async def start_weights(self) -> None:
        """Begin to replace the weights. Call `pause` first."""
        await self._call("POST", "/start_weight_update")

    async def receive_weights(self, sender: int, infos: Mapping[str, TensorInfo]) -> None:
        """Receive these tensors, which a sender broadcasts in buckets, and load them."""
        info = {
            "names": list(infos),
            "dtype_names": [str(info.dtype).removeprefix("torch.") for info in infos.values()],
            "shapes": [list(info.shape) for info in infos.values()],
        }
        await self._on_workers("aropd_choose_sender", sender=sender)
        await self._call("POST", "/update_weights", json={"update_info": info})

    async def finish_weights(self) -> None:
        """End what `start_weights` has begun."""
        await self._call("POST", "/finish_weight_update", json={})

    async def sleep(self, *, keeps_weights: bool) -> None:
        """Release the memory of weights and KV cache.

        Args:
            keeps_weights: copy the weights to the host until `wake`. If not, they are lost.
        """
        level = 1 if keeps_weights else 2
        await self._call("POST", "/sleep", params={"level": level, "mode": "abort"})
        await self._call("POST", "/update_weight_version", json={"new_version": "asleep"})

    async def wake(self) -> None:
        """Allocate the memory that `sleep` has released, if it has. Load weights or an adapter
        next."""
        await self._call("POST", "/wake_up")

    async def generate(
        self,
        prompt: Sequence[int],
        seed: int | None,
        sampling: SamplingConfig,
        *,
        eos_token_ids: Sequence[int],
        weight_version: str,
        adapter: str | None = None,
    ) -> tuple[list[int], list[float]]:
        """Sample one response; return its token ids, including the final EOS, and their log-probs.

        Args:
            seed: seed of the response. None: the server's generator, which depends on its batches.
            adapter: name of the loaded adapter that samples. None: the base model samples.
        Raises:
            ServerError: the request failed, other weights produced the response, or it ended
                neither by EOS nor after `max_response_tokens` tokens.
        """
        params = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "max_tokens": sampling.max_response_tokens,
            **({} if seed is None else {"seed": seed}),
            "stop_token_ids": list(eos_token_ids),
            "ignore_eos": True,  # only the tokens above end a response
            "logprobs": 0,  # of the sampled token
            "detokenize": False,
        }
        choice, _ = await self._sample(prompt, params, adapter)
        ids, logprobs = _sampled(choice)
        versions = _versions(choice)
        if versions != {weight_version}:
            raise ServerError(
                f"weights {', '.join(sorted(versions)) or 'of no version'} produced a response; "
                f"expected weights {weight_version}"
            )
        ends = [i for i, id in enumerate(ids, start=1) if id in eos_token_ids]
        limit = sampling.max_response_tokens
        if len(ids) > limit or (ends[0] if ends else limit) != len(ids):
            why = f"EOS at {ends[0]}" if ends else "no EOS"
            raise ServerError(
                f"it returned {len(ids)} tokens, {why}; expected an end at the first EOS or at "
                f"{limit} tokens"
            )
        return ids, logprobs

    async def score(self, ids: Sequence[int], adapter: str | None = None) -> list[float]:
        """Return the log-prob of every token but the first, under the unmodified softmax.

        `adapter` is as in `generate`.

        vLLM reports the last one as that of a sampled token, and only this token is allowed. If
        log-probs were taken after the sampling settings, it would be 0.
        """
        params = {
            "temperature": 1.0,
            "max_tokens": 1,
            "allowed_token_ids": [ids[-1]],
            "ignore_eos": True,
            "logprobs": 0,
            "prompt_logprobs": 0,
            "detokenize": False,
        }
        choice, answer = await self._sample(ids[:-1], params, adapter)
        try:
            places = zip(answer["prompt_logprobs"][1:], ids[1:-1], strict=True)
            prompt = [float(place[str(id)]["logprob"]) for place, id in places]
        except (LookupError, TypeError, ValueError) as error:
            raise ServerError(f"a prompt's log-probs are {_brief(answer)}") from error
        last, logprobs = _sampled(choice)
        if last != [ids[-1]]:
            raise ServerError(f"it sampled {last}; the only allowed token was {ids[-1]}")
        return prompt + logprobs

    async def _on_workers(self, method: str, **arguments: str | int) -> Mapping[str, Any]:
        call = {"method": method, "kwargs": arguments}
        return await self._call("POST", "/collective_rpc", json=call)

    async def _sample(
        self, prompt: Sequence[int], params: Mapping[str, Any], adapter: str | None
    ) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Return the only choice of an answer, and the answer."""
        call = {"token_ids": list(prompt), "sampling_params": dict(params)}
        retried = _RETRIED
        if adapter is not None:
            call["model"] = adapter
            retried = (*_RETRIED, _NOT_FOUND)  # a restarted server has no adapter yet
        answer = await self._call("POST", "/inference/v1/generate", json=call, retried=retried)
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            count = len(choices) if isinstance(choices, list) else "no"
            raise ServerError(f"it returned {count} responses for one prompt: {_brief(answer)}")
        return choices[0], answer

    async def _call(
        self,
        method: str,
        path: str,
        *,
        timeout: float | None = None,
        has_answer: bool = True,
        retried: Sequence[int] = _RETRIED,
        **content: Any,
    ) -> Mapping[str, Any]:
        """Send a request and return its JSON object, {} if the answer is empty.

        Args:
            has_answer: False: the answer is a text for people, and {} is returned.
            retried: status codes 4xx after which a retry may succeed.
        """
        limit = timeout or self._timeout
        try:
            async with asyncio.timeout(limit):
                reply = await self._http.request(
                    method, self._url + path, headers=self._headers, timeout=None, **content
                )
        except TimeoutError as error:
            raise ServerError(f"{path}: no answer in {limit:g} s") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServerError(f"{path}: {type(error).__name__} {error}".rstrip()) from error
        if reply.status_code != httpx.codes.OK:
            refused = reply.is_client_error and reply.status_code not in retried
            kind = RefusedByServer if refused else ServerError
            raise kind(f"{path}: answered {reply.status_code}: {_brief(reply.text)}")
        if not reply.content or not has_answer:
            return {}
        try:
            answer = reply.json()
        except ValueError as error:
            raise ServerError(f"{path}: not JSON: {_brief(reply.text)}") from error
        if not isinstance(answer, dict):
            raise ServerError(f"{path}: not a JSON object: {_brief(answer)}")
        return answer


def _sampled(choice: Mapping[str, Any]) -> tuple[list[int], list[float]]:
    try:
        ids = [int(id) for id in choice["token_ids"]]
        content = choice["logprobs"]["content"]
        named = [int(token["token_id"]) for token in content]
        logprobs = [float(token["logprob"]) for token in content]
    except (LookupError, TypeError, ValueError) as error:
        raise ServerError(f"not a response: {_brief(choice)}") from error
    if not ids or named != ids:
        raise ServerError(f"it returned {len(ids)} tokens with the log-probs of {len(named)}")
    if not all(math.isfinite(value) and value > _NO_LOGPROB for value in logprobs):
        raise ServerError("a sampled token's log-prob is not finite")
    return ids, logprobs


def _versions(choice: Mapping[str, Any]) -> set[str]:
    try:
        return {str(span["version"]) for span in choice["weight_versions"] or []}
    except (LookupError, TypeError) as error:
        raise ServerError(f"its weight versions are {_brief(choice)}") from error


def _text(answer: Mapping[str, Any], key: str) -> str:
    value = answer.get(key)
    if not isinstance(value, str):
        raise ServerError(f"expected {key}, found {_brief(answer)}")
    return value


def _brief(content: Any) -> str:
    text = str(content)
    return text if len(text) <= 200 else text[:200] + " ..."
