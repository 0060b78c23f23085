"""An engine without a model, for tests of the front: it paints squares, at a pace that a test decides."""

import base64
import io
import threading
import time

from PIL import Image

from sdjax.serve.stats import Leased, Stats
from sdjax.serve.store import Tick


def painted(seed, width, height, kind="png"):
    """The bytes of a picture of one colour, by its seed."""
    file = io.BytesIO()
    color = tuple(seed * factor % 256 for factor in (37, 91, 151))
    Image.new("RGB", (width, height), color).save(file, kind.upper())
    return file.getvalue()


class FakeEngine:
    """Draws one job at a time in a thread. `go` lets it take a step; jobs whose prompt says "fail" do."""

    def __init__(self, store, step_seconds=0.0):
        self.store = store
        self.step_seconds = step_seconds
        self.steps_drawn = 0
        self.go = threading.Event()
        self.go.set()
        self.stopping = threading.Event()
        self.deadline = float("inf")
        self.woken = threading.Event()
        self.leased = {}
        store.subscribe(lambda _: self.woken.set())
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def stats(self):
        return Stats(
            slots=2,
            drawing=1,
            pending=0,
            finishing=0,
            slices=4,
            rows=6,
            places=8,
            steps=20,
            slice_seconds=1.5,
            compiles=3,
            ended={},
            step_seconds={"64x64-guided": 0.01},
            leased=dict(self.leased),
        )

    def drain(self, seconds):
        self.deadline = time.monotonic() + seconds
        self.stopping.set()
        self.woken.set()
        self.thread.join(seconds + 5)

    def _run(self):
        while not self.stopping.is_set():
            self.woken.clear()
            leases = self.store.lease(None, 1, owner="fake", seconds=60)
            if not leases:
                self.woken.wait(0.1)
            for lease in leases:
                self._draw(lease)
                self.leased = {}

    def _draw(self, lease):
        job, fence, request = lease.job, lease.fence, lease.job.request
        total = request["steps"]
        for step in range(1, total + 1):
            left = (total - step + 1) * request["num_images"]
            self.leased = {job.id: Leased(job.bucket, request["num_images"], left)}
            while not self.go.wait(0.01):
                if time.monotonic() > self.deadline or self._tick(job, fence, []):
                    self.store.release(job.id, fence)
                    return
            time.sleep(self.step_seconds)
            self.steps_drawn += 1
            done = {"step": step, "total": total, "percent": 100 * step / total}
            events = [("progress", done)]
            if request["preview_every"] and step % request["preview_every"] == 0 and step < total:
                preview = base64.b64encode(painted(step, 16, 16)).decode()
                events.append(("preview", {**done, "image": preview, "format": "png"}))
            if self._tick(job, fence, events):
                return
        if "fail" in request["prompt"]:
            self.store.fail(job.id, fence, "not_finite", "it came out as NaN")
            return
        sizes = (request["width"], request["height"], request["response"])
        images = [(request["response"], painted(request["seed"] + i, *sizes)) for i in range(request["num_images"])]
        data = {"seed": request["seed"], "format": request["response"], "timings": {"denoise": 0.5}}
        self.store.finish(job.id, fence, images, data=data)

    def _tick(self, job, fence, events):
        return bool(self.store.tick([Tick(job.id, fence, events)], seconds=60))
