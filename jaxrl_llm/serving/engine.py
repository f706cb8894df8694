"""The thread that owns the slots: it takes generations from a bounded queue, reads prompts and draws tokens.

Nobody else touches the model. Each turn of its loop drops who is gone or late, takes new weights, fills free slots,
reads at most a chunk's worth of prompts, and draws one token in every slot that is ready: a long prompt delays the
others by one chunk at a time.
"""

import logging
import math
import threading
import time
from collections import deque
from concurrent.futures import Future

import numpy as np

from jaxrl_llm.models.files import one_line
from jaxrl_llm.models.tokenizers import Tokenizer
from jaxrl_llm.models.transformer import Transformer
from jaxrl_llm.rollouts.chunks import LARGEST_CHUNK
from jaxrl_llm.rollouts.constrained import TokenMasker
from jaxrl_llm.rollouts.slot_decoder import Draw
from jaxrl_llm.rollouts.slot_decoder import Drawn
from jaxrl_llm.rollouts.slot_decoder import SlotDecoder
from jaxrl_llm.serving.errors import APIError
from jaxrl_llm.serving.generation import Job
from jaxrl_llm.serving.metrics import Metrics
from jaxrl_llm.typing import UInt32


class Engine:
    """Decodes jobs in a thread of its own, from `start` to `stop`.

    Args:
        decoder: the model's slots.
        tokenizer: of the model.
        end_ids: tokens that can end an answer.
        queue: jobs that may wait for a slot.
        metrics: that it counts in.

    Attributes:
        version: of the weights; 0 for those that it started with.
        failed: why it stopped by itself, for the log only; empty while it works.
    """

    def __init__(
        self,
        decoder: SlotDecoder,
        tokenizer: Tokenizer,
        *,
        end_ids: tuple[int, ...],
        queue: int,
        metrics: Metrics,
    ) -> None:
        self.decoder, self.tokenizer, self.metrics = decoder, tokenizer, metrics
        self.masker = TokenMasker(tokenizer, decoder.config.vocab_size, end_ids=end_ids)
        self.version, self.failed = 0, ""
        self._rows = self.masker.start([None] * decoder.count)
        self._limit = queue
        self._waiting: deque[Job] = deque()
        self._working: dict[int, Job] = {}
        # In the order of their arrival: prompts are read one after another.
        self._reading: deque[int] = deque()
        self._gone: set[Job] = set()
        self._weights: deque[tuple[Transformer, int | None, Future[int]]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="slots", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """End; jobs that are not finished fail."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, jobs: list[Job]) -> None:
        """Put jobs in the queue, all or none.

        Raises:
            APIError: the queue has no room for them, or the engine has stopped.
        """
        most = self._limit + self.decoder.count
        if len(jobs) > most:
            raise APIError(
                400, f"{len(jobs)} answers are asked for; expected at most {most} at a time.", code="too_many"
            )
        with self._wake:
            if self._stopping or self.failed:
                raise _stopped()
            free = self.decoder.count - len(self._working)
            if len(self._waiting) + len(jobs) > self._limit + free:
                raise APIError(
                    429,
                    f"{len(self._waiting)} generations are waiting; {len(jobs)} more do not fit into the queue of "
                    f"{self._limit}.",
                    code="queue_full",
                    retry_after=1,
                )
            self._waiting += jobs
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for this job any more; its slot is free at the next step."""
        with self._wake:
            if not job.ended:
                self._gone.add(job)
                self._wake.notify()

    def load(self, model: Transformer, version: int | None = None) -> "Future[int]":
        """Go on with these weights from the next step on; the result is their version.

        Args:
            model: of the same structure.
            version: larger than that of the weights before; None: the next one.

        Raises:
            APIError: the engine has stopped; by the result, that the weights cannot be taken.
        """
        done: Future[int] = Future()
        with self._wake:
            if self._stopping or self.failed:
                raise _stopped()
            self._weights.append((model, version, done))
            self._wake.notify()
        return done

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except Exception as error:  # whatever it is, clients are told instead of waiting for ever
            self.failed = one_line(error) or type(error).__name__
            logging.getLogger(__name__).exception("the engine has stopped")
        finally:
            with self._wake:
                self._stopping = True
                left, weights = [*self._waiting, *self._working.values()], [*self._weights]
                self._weights.clear()
            for job in left:
                job.fail(_stopped())
            for _, _, done in weights:
                if done.set_running_or_notify_cancel():
                    done.set_exception(_stopped())

    def _turn(self) -> bool:
        with self._wake:
            while not (self._stopping or self._waiting or self._working or self._weights):
                self._gone.clear()
                self._wake.wait()
            if self._stopping:
                return False
            gone, self._gone = self._gone, set()
        self._drop(gone)
        self._swap()
        self._fill()
        self._read()
        self._draw()
        self.metrics.queued.set(len(self._waiting))
        self.metrics.busy_slots.set(len(self._working))
        return True

    def _drop(self, gone: set[Job]) -> None:
        """Free what nobody waits for, and what is late."""
        now = time.monotonic()
        late = {job for job in (*self._waiting, *self._working.values()) if job.deadline < now and job not in gone}
        left = gone | late
        self.metrics.cancelled.inc(sum(not job.ended for job in gone))
        with self._wake:
            self._waiting = deque(job for job in self._waiting if job not in left)
        for slot, job in list(self._working.items()):
            if job in left:
                self._free(slot)
        for job in late:  # once its place is free for the next attempt
            seconds = job.deadline - job.begun
            job.fail(APIError(504, f"the answer took longer than {seconds:g} s.", code="timeout"))
        for job in gone:
            job.ended = True

    def _free(self, slot: int) -> None:
        del self._working[slot]
        self.decoder.close(slot)
        self._rows.replace(slot, None)
        if slot in self._reading:
            self._reading.remove(slot)

    def _swap(self) -> None:
        while self._weights:
            model, version, done = self._weights.popleft()
            if not done.set_running_or_notify_cancel():
                continue
            try:
                version = self.version + 1 if version is None else version
                if version <= self.version:
                    raise APIError(
                        409,
                        f"version is {version}; expected more than {self.version}, that of the weights here.",
                        param="version",
                    )
                self.decoder.load(model)
            except APIError as error:
                done.set_exception(error)
            except ValueError as error:
                done.set_exception(APIError(400, f"the weights do not fit: {error}", code="other_model"))
            except Exception:  # no memory for them, say: whoever sent them is told, and the old ones go on
                logging.getLogger(__name__).exception("weights were not taken")
                done.set_exception(APIError(500, "the weights were not taken; the log says why.", code="failed"))
            else:
                self.version = version
                self.metrics.weights_version.set(version)
                self._reading = deque(self._working)
                done.set_result(version)

    def _fill(self) -> None:
        while len(self._working) < self.decoder.count:
            with self._wake:
                if not self._waiting:
                    return
                job = self._waiting[0]  # until it has a slot, so that it is told if this fails
            slot = self.decoder.open(job.asked.prompt)
            self._working[slot] = job
            with self._wake:
                self._waiting.popleft()
            self._rows.replace(slot, job.matcher)
            self._reading.append(slot)
            self.metrics.prompt_tokens.inc(len(job.asked.prompt))

    def _read(self) -> None:
        """Read prompts, at most a chunk's worth of tokens."""
        left = LARGEST_CHUNK
        while self._reading and left > 0:
            slot = self._reading[0]
            job = self._working[slot]
            if job.asked.score_prompt and not job.count:
                # After new weights it begins anew.
                start = len(job.asked.prompt) - 1 - self.decoder.unread(slot)
                scores = self.decoder.score(slot)
                job.prompt_log_probs[start:] = scores
                count, job.reused = len(scores), 0
            else:
                waiting = self.decoder.unread(slot)
                count = self.decoder.read(slot)
                if job.reused is None:
                    job.reused = waiting - count - self.decoder.unread(slot)
                    self.metrics.reused_tokens.inc(job.reused)
            left -= count
            if not self.decoder.unread(slot):
                self._reading.popleft()

    def _draw(self) -> None:
        ready = [slot for slot in self._working if slot not in self._reading]
        if not ready:
            return
        masks = self._masks(ready)
        draws = {}
        for slot in ready:
            if slot not in self._working:  # its grammar failed
                continue
            asked = self._working[slot].asked
            how = (asked.temperature, asked.top_p, masks.get(slot), asked.listed > 0)
            draws[slot] = Draw(asked.seed, self._working[slot].count, *how)
        if not draws:
            return
        begun = time.monotonic()
        drawn = self.decoder.step(draws)
        now = time.monotonic()
        self.metrics.step.observe(now - begun)
        self.metrics.generated_tokens.inc(len(drawn))
        for slot, one in drawn.items():
            job = self._working[slot]
            if not job.count:
                self.metrics.first_token.observe(now - job.begun)
            if math.isnan(one.log_prob):
                job.fail(APIError(500, "the model's logits are no distribution.", code="not_finite"))
            else:
                self._take(slot, job, one)
            if job.ended:
                self._free(slot)

    def _take(self, slot: int, job: Job, drawn: Drawn) -> None:
        if job.asked.grammar is not None:
            try:
                self._rows.advance(slot, drawn.token)
            except ValueError as error:  # of one answer, and no reason to end the others
                job.fail(APIError(500, one_line(error), code="grammar_failed"))
                return
        room = self.decoder.context - len(self.decoder.texts[slot] or ())
        # A grammar may end where the request itself has no end token: nothing can follow.
        job.take(drawn, self.version, room=room, ended=self._rows.is_finished(slot))

    def _masks(self, ready: list[int]) -> dict[int, UInt32[np.ndarray, " W"]]:
        """Which tokens the grammars allow; a grammar that fails ends its job."""
        held = [slot for slot in ready if self._working[slot].asked.grammar is not None]
        if not held:
            return {}
        begun = time.monotonic()
        found = {}
        for slot in held:
            try:
                found[slot] = self._rows.mask([slot])[0]
            except RuntimeError as error:
                self._working[slot].fail(APIError(500, one_line(error), code="grammar_failed"))
                self._free(slot)
        self.metrics.mask.observe(time.monotonic() - begun)
        return found


def _stopped() -> APIError:
    return APIError(503, "the engine has stopped; the server's log says why.", code="stopped")
