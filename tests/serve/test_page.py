"""The web page, as a person uses it: a real browser, and `sdjax serve` with the bundled model."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from tests.native import SIDE
from tests.serve.browser import chromium
from tests.serve.conftest import KEY, picture, wait_for
from tests.serve.test_process import RED_ON_BLUE, Process

DESKTOP = {"width": 1280, "height": 900}
PHONE = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
GREEN = (0, 128, 0)
SECONDS = 60_000


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def process(folder):
    started = ready(Process("--data-dir", str(folder)))
    yield started
    if started.process.poll() is None:
        started.stop()


def ready(process):
    wait_for(lambda: process.client.get("/ready").status_code == 200, 300)
    return process


@pytest.fixture
def visit(browser):
    """Open the page of a server. It must ask no other host for anything, and run without an error."""
    contexts, wrong = [], []

    def open_page(url, expected=(), **options):
        context = browser.new_context(**{"viewport": DESKTOP, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(SECONDS)
        ours = (url, f"blob:{url}", "data:")
        page.on("request", lambda request: request.url.startswith(ours) or wrong.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "console",
            lambda said: (
                said.type == "error" and not any(text in said.text for text in expected) and wrong.append(said.text)
            ),
        )
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture
def page(visit, process):
    opened = visit(process.url)
    opened.wait_for_selector("#status[data-state=ready]")
    return opened


def draw(page, prompt=RED_ON_BLUE, **fields):
    """Fill in the form and press the button: the new card."""
    page.locator("details.more").evaluate("details => { details.open = true }")
    for name, value in {"prompt": prompt, **fields}.items():
        page.locator(f"#{name}").fill(str(value))
    with page.expect_response(lambda answer: answer.request.method == "POST") as answer:
        page.locator("#draw").click()
    return card_of(page, answer.value.json()["job_id"])


def card_of(page, job_id):
    card = page.locator(f"[data-job='{job_id}']")
    card.wait_for()
    return card


def wait_state(card, state):
    card.and_(card.page.locator(f"[data-state={state}]")).wait_for()


def seen(card):
    """The picture's pixels as they are on the screen."""
    image = card.locator(".open img")
    image.evaluate("image => image.decode()")
    return np.asarray(Image.open(io.BytesIO(image.screenshot())).convert("RGB")).astype(int)


def kept(process, job_id, path="images/0"):
    data = process.client.get(f"/v1/jobs/{job_id}/{path}").content
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def choose_green(page):
    """Start from a green picture."""
    file = {"name": "green.png", "mimeType": "image/png", "buffer": picture(SIDE, SIDE, color=GREEN)}
    page.locator("#start-file").set_input_files(file)
    page.locator("#mask").wait_for()


def test_with_the_keyboard_alone_a_prompt_becomes_a_picture_on_the_screen(page):
    page.keyboard.type(RED_ON_BLUE)  # the prompt has the focus
    while page.evaluate("document.activeElement.id") != "seed":
        page.keyboard.press("Tab")
    page.keyboard.type("7")
    while page.evaluate("document.activeElement.id") != "draw":
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    card = page.locator(".card").first
    wait_state(card, "complete")
    pixels = seen(card)
    height, width, _ = pixels.shape
    red, green, blue = np.moveaxis(pixels, -1, 0)
    is_red, is_blue = (red > 150) & (blue < 100) & (green < 100), (blue > 150) & (red < 100)
    assert 0.1 < is_red.mean() < 0.6
    assert is_blue.mean() > 0.3
    rows, columns = np.nonzero(is_red)
    assert is_red[int(rows.mean()), int(columns.mean())]  # one shape, not red here and there
    assert abs(height - width) <= 1
    assert "Seed 7" in card.locator(".facts").inner_text().replace("\n", " ")


def test_progress_and_previews_are_seen_and_heard_while_it_draws(page):
    card = draw(page, steps=150, seed=1, num_images=2)
    card.locator(".preview").wait_for()
    assert re.match(r"Step \d+ of 150", card.locator(".stage").inner_text())
    assert 0 < card.locator("progress").evaluate("bar => bar.position") < 1
    assert card.get_attribute("aria-busy") == "true"
    wait_state(card, "complete")
    assert card.locator(".preview").is_hidden()
    assert page.locator("#announcer[aria-live=polite]").inner_text().startswith("Done")
    assert card.locator(".strip button").count() == 2
    card.get_by_role("button", name="Picture 2").click()
    assert "Seed 2" in card.locator(".facts").inner_text().replace("\n", " ")


def test_a_job_is_cancelled(page, process):
    card = draw(page, steps=150, num_images=8)
    card.get_by_role("button", name="Cancel").click()
    wait_state(card, "cancelled")
    job_id = card.get_attribute("data-job")
    assert process.client.get(f"/v1/jobs/{job_id}").json()["state"] == "cancelled"


def test_a_reload_in_the_middle_goes_on_with_the_job(page):
    card = draw(page, steps=150, num_images=2, seed=5)
    card.locator(".preview").wait_for()
    page.reload()
    card.locator(".preview").wait_for()
    wait_state(card, "complete")
    assert seen(card).std() > 0


def test_those_who_wait_see_their_place(page):
    first = [draw(page, steps=150, num_images=8) for _ in range(3)]
    stages = wait_for(lambda: (said := first[2].locator(".stage").inner_text()) and said)
    assert re.search(r"in the queue|Step|Drawing", stages)
    for card in first:
        card.get_by_role("button", name="Cancel").click()
    for card in first:
        wait_state(card, "cancelled")


def test_settings_are_used_again(page, process):
    card = draw(page, "a yellow star", seed=2**64 - 1, steps=3, guidance_scale=2.5, negative_prompt="a circle")
    wait_state(card, "complete")
    page.reload()
    page.wait_for_selector("#status[data-state=ready]")
    card.get_by_role("button", name="Use these settings").click()
    names = ("prompt", "seed", "steps", "guidance_scale", "negative_prompt")
    values = [page.locator(f"#{name}").input_value() for name in names]
    assert values == ["a yellow star", str(2**64 - 1), "3", "2.5", "a circle"]
    with page.expect_response(lambda answer: answer.request.method == "POST") as answer:
        page.keyboard.press("Control+Enter")
    again = card_of(page, answer.value.json()["job_id"])
    wait_state(again, "complete")
    first, second = (kept(process, each.get_attribute("data-job")) for each in (card, again))
    np.testing.assert_array_equal(first, second)


def test_a_painted_mask_is_what_is_drawn_anew(page, process):
    choose_green(page)
    box = page.locator("#mask").bounding_box()
    scale = box["width"] / SIDE
    page.mouse.move(box["x"] + 8 * scale, box["y"] + 20 * scale)
    page.mouse.down()
    page.mouse.move(box["x"] + 40 * scale, box["y"] + 20 * scale, steps=5)
    page.mouse.up()
    card = draw(page, strength=1, seed=3)
    wait_state(card, "complete")
    job_id = card.get_attribute("data-job")
    mask, drawn = kept(process, job_id, "inputs/mask_image")[..., 0], kept(process, job_id)
    assert set(np.unique(mask)) == {0, 255}
    assert (mask[20, 8:40] == 255).all()
    assert (mask[40:] == 0).all()
    assert (mask[:, 52:] == 0).all()
    assert (drawn[mask == 0] == GREEN).all()
    assert (drawn[mask == 255] != GREEN).any()


def test_a_mask_can_be_made_without_a_pointer(page, process):
    choose_green(page)
    page.locator("#brush-size").fill("4")
    page.locator("#mask").focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    page.keyboard.press(" ")
    page.keyboard.press("ArrowDown")
    page.keyboard.press(" ")
    page.keyboard.press("Control+z")
    page.get_by_text("Mask without a brush").click()
    for name, value in {"x": 0, "y": SIDE - 16, "width": SIDE, "height": 16}.items():
        page.locator(f"#rect-{name}").fill(str(value))
    page.get_by_role("button", name="Add rectangle").click()
    card = draw(page, strength=1, seed=3, steps=8)
    wait_state(card, "complete")
    job_id = card.get_attribute("data-job")
    mask, drawn = kept(process, job_id, "inputs/mask_image")[..., 0], kept(process, job_id)
    assert (mask[SIDE - 16 :] == 255).all()
    assert mask[SIDE // 2, SIDE // 2 + 8] == 255
    assert mask[SIDE // 2 + 3, SIDE // 2 + 8] == 0  # undone
    assert (mask[: SIDE - 16] == 255).sum() < 30
    assert (drawn[mask == 0] == GREEN).all()
    assert (drawn[48:] != GREEN).any()


def test_a_drawn_picture_is_started_from(page, process):
    first = draw(page, seed=7, steps=8)
    wait_state(first, "complete")
    first.get_by_role("button", name="Start from this picture").click()
    page.locator("#mask").wait_for()
    assert page.locator("#width").is_disabled()
    card = draw(page, "a green square on a yellow background", strength=0.5)
    wait_state(card, "complete")
    first_id, job_id = (each.get_attribute("data-job") for each in (first, card))
    np.testing.assert_array_equal(kept(process, job_id, "inputs/input_image"), kept(process, first_id))
    page.get_by_role("button", name="Remove picture").click()
    assert page.locator("#width").is_enabled()


def test_an_error_stands_beside_its_field(visit, process):
    page = visit(process.url, expected=["status of 422"])
    page.wait_for_selector("#status[data-state=ready]")
    page.locator("#draw").click()
    problem = page.locator("[data-field=prompt] .problem")
    problem.wait_for()
    prompt = page.locator("#prompt")
    assert prompt.get_attribute("aria-invalid") == "true"
    assert prompt.get_attribute("aria-describedby") == problem.get_attribute("id")
    prompt.fill(RED_ON_BLUE)
    page.locator("#steps").fill("151")
    page.keyboard.press("Control+Enter")
    problem = page.locator("[data-field=steps] .problem")
    problem.wait_for()
    assert "150" in problem.inner_text()
    assert page.locator(".problem:visible").count() == 1
    assert page.evaluate("document.activeElement.id") == "steps"


def test_mistakes_are_told_in_a_persons_words_before_anything_is_sent(page):
    asked = []
    page.on("request", lambda request: request.method == "POST" and asked.append(request.url))
    for field, value, words in (
        ("prompt", "  ", "Write a prompt."),
        ("steps", "151", "Use a whole number from 1 to 150."),
        ("steps", "2.5", "Use a whole number from 1 to 150."),
        ("guidance_scale", "21", "Use a number from 0 to 20."),
        ("width", "65", "Use a multiple of 8 from 64 to 2048."),
        ("num_images", "9", "Use a whole number from 1 to 8."),
        ("seed", "-1", "Use a whole number from 0 to 18446744073709551615, or nothing for a random seed."),
        ("seed", str(2**64), "Use a whole number from 0 to 18446744073709551615, or nothing for a random seed."),
    ):
        page.locator("#prompt").fill("a circle")
        before = page.locator(f"#{field}").input_value()
        page.locator(f"#{field}").fill(value)
        page.keyboard.press("Control+Enter")
        assert page.locator(f"[data-field~={field}] .problem").inner_text() == words
        assert page.evaluate("document.activeElement.id") == field
        page.locator(f"#{field}").fill(before)
    assert asked == []


def test_a_server_that_does_not_answer_is_told_and_tried_again(visit, server):
    page = visit(server.url, expected=["ERR_INTERNET_DISCONNECTED", "ERR_FAILED"])
    page.wait_for_selector("#status[data-state=ready]")
    page.locator("#prompt").fill("a circle")
    page.context.set_offline(True)
    page.locator("#draw").click()
    page.locator("#form-problem").filter(has_text="The server does not answer. What you wrote stays here").wait_for()
    page.locator("#status-text").filter(has_text="The server does not answer; trying again").wait_for()
    page.context.set_offline(False)
    page.wait_for_selector("#status[data-state=ready]")
    assert page.locator("#prompt").input_value() == "a circle"
    page.locator("#draw").click()
    wait_state(page.locator(".card").first, "complete")
    assert page.locator("#form-problem").inner_text() == ""


def test_the_form_survives_a_reload(page):
    choose_green(page)
    page.locator("#add-rect").evaluate("button => button.closest('details').open = true")
    page.get_by_role("button", name="Add rectangle").click()
    page.locator("details.more").evaluate("details => { details.open = true }")
    filled = {
        **{"prompt": "a star\nof two lines", "negative_prompt": "a ring", "steps": "33", "guidance_scale": "2.5"},
        **{"seed": "18446744073709551615", "num_images": "4", "strength": "0.35", "loras": "x:0.5"},
    }
    chosen = {"sampler": "unipc", "schedule": "karras", "response": "webp"}
    for name, value in filled.items():
        page.locator(f"#{name}").fill(value)
    for name, value in chosen.items():
        page.locator(f"#{name}").select_option(value)
    page.locator("#previews").uncheck()
    wait_for(lambda: page.evaluate("JSON.parse(sessionStorage['sdjax.form.pictures'] ?? '{}').mask"))
    page.reload()
    page.wait_for_selector("#status[data-state=ready]")
    for name, value in {**filled, **chosen}.items():
        assert page.locator(f"#{name}").input_value() == value, name
    assert not page.locator("#previews").is_checked()
    page.locator("#undo:enabled").wait_for()
    assert page.locator("#start-image").evaluate("image => image.naturalWidth") == SIDE


def test_what_stood_in_the_form_for_another_model_gives_way_to_this_models_own(page):
    page.locator("#prompt").fill("a star")
    page.locator("#steps").fill("7")
    page.reload()
    page.wait_for_selector("#status[data-state=ready]")
    assert page.locator("#steps").input_value() == "7"
    page.add_init_script(
        "sessionStorage['sdjax.form'] = sessionStorage['sdjax.form'].replace('\"model\":\"tiny', '\"model\":\"another')"
    )
    page.reload()
    page.wait_for_selector("#status[data-state=ready]")
    assert page.locator("#steps").input_value() == "20"
    assert page.locator("#prompt").input_value() == "a star"


def test_the_viewer_turns_from_picture_to_picture_with_prompt_and_seed(visit, serve):
    server = serve()
    jobs = [server.submit(f"picture {i}", seed=10 * i, num_images=2, steps=1) for i in (1, 2)]
    for job in jobs:
        server.wait(job, "complete")
    page = visit(server.url)
    page.locator(f"[data-job='{jobs[1]}'] .open").click()
    viewer = page.locator("#viewer")
    found = []
    for _ in range(4):
        text = viewer.inner_text().replace("\n", " ")
        found.append(re.search(r"(picture \d).*Seed (\d+)", text).groups())
        assert viewer.locator("#viewer-image").evaluate("image => image.decode().then(() => image.naturalWidth)") == 64
        if len(found) < 4:
            viewer.get_by_role("button", name="Next picture").click()
    assert found == [("picture 2", "20"), ("picture 2", "21"), ("picture 1", "10"), ("picture 1", "11")]
    assert viewer.get_by_role("button", name="Next picture").is_disabled()
    viewer.get_by_role("button", name="Previous picture").click()
    page.keyboard.press("ArrowLeft")
    assert "picture 2" in viewer.inner_text()
    page.keyboard.press("ArrowRight")
    viewer.get_by_role("button", name="Use these settings").click()
    assert viewer.is_hidden()
    assert page.locator("#prompt").input_value() == "picture 1"
    page.locator(f"[data-job='{jobs[1]}'] .open").click()
    assert viewer.get_by_role("button", name="Previous picture").is_disabled()
    page.keyboard.press("Escape")
    assert viewer.is_hidden()


def test_a_long_prompt_is_folded_until_somebody_wants_to_read_it(visit, server):
    job = server.submit("a red circle on a blue background, " * 50, steps=1)
    page = visit(server.url)
    card = card_of(page, job)
    button = card.locator(".words").get_by_role("button", name="Show all")
    button.wait_for()
    assert card.locator(".prompt").bounding_box()["height"] < 90
    card.hover()
    assert card.locator(".prompt").bounding_box()["height"] < 90
    button.click()
    assert card.locator(".prompt").bounding_box()["height"] > 200
    card.locator(".words").get_by_role("button", name="Show less").click()
    assert card.locator(".prompt").bounding_box()["height"] < 90
    short = draw(page, "a circle", steps=1)
    assert short.locator(".words .fold").is_hidden()


def test_what_was_not_understood_stands_on_the_card(visit, server):
    page = visit(server.url)
    page.wait_for_selector("#status[data-state=ready]")
    card = draw(page, "a dog", steps=2)
    assert card.get_by_label("Warnings").inner_text() == "This model does not know: dog"
    assert draw(page, "a circle", steps=2).get_by_label("Warnings").is_hidden()


def test_number_and_schedule_are_in_sight_and_used(page, process):
    for name in ("num_images", "schedule", "sampler", "steps", "seed"):
        assert page.locator(f"#{name}").is_visible(), name
    page.locator("#schedule").select_option("karras")
    page.locator("#sampler").select_option("euler")
    page.locator("#num_images").fill("2")
    card = draw(page, steps=3)
    wait_state(card, "complete")
    request = process.client.get(f"/v1/jobs/{card.get_attribute('data-job')}").json()["request"]
    assert (request["schedule"], request["sampler"], request["num_images"]) == ("karras", "euler", 2)
    assert "Schedule karras" in card.locator(".facts").inner_text().replace("\n", " ")
    page.locator("#schedule").select_option("")
    card.get_by_role("button", name="Use these settings").click()
    assert page.locator("#schedule").input_value() == "karras"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_field_that_can_be_filled_does_not_look_disabled(visit, server, scheme):
    page = visit(server.url, color_scheme=scheme)
    page.wait_for_selector("#status[data-state=ready]")

    def look(name):
        return page.locator(f"#{name}").evaluate(
            "(field) => ['backgroundColor', 'borderStyle', 'color'].map((name) => getComputedStyle(field)[name])"
        )

    page.locator("#prompt").fill("a circle")
    page.locator("#steps").focus()
    enabled = look("width")
    assert look("prompt") == enabled
    choose_green(page)
    assert all(one != other for one, other in zip(enabled, look("width"), strict=True))


def test_the_documentation_looks_like_the_page_and_leads_back(visit, server):
    page = visit(server.url)
    ground = "getComputedStyle(document.documentElement).backgroundColor + getComputedStyle(document.body).fontFamily"
    before = page.evaluate(ground)
    page.get_by_role("link", name="API").click()
    page.get_by_role("heading", name="Routes").wait_for()
    assert page.evaluate(ground) == before
    page.get_by_text("Submit a job").last.click()
    page.get_by_role("link", name="ImageGeneration").first.click()
    page.get_by_role("link", name="Back to the pictures").click()
    page.wait_for_selector("#status[data-state=ready]")


def test_on_a_phone_the_documentation_is_no_wider_than_the_screen(visit, server):
    page = visit(server.url, **PHONE)
    page.get_by_role("link", name="API").tap()
    page.get_by_role("heading", name="Routes").wait_for()
    page.locator("details").evaluate_all("all => all.forEach((details) => { details.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_on_a_phone_nothing_is_wider_than_the_screen(visit, process):
    page = visit(process.url, **PHONE)
    page.wait_for_selector("#status[data-state=ready]")
    choose_green(page)
    page.locator("details").evaluate_all("all => all.forEach((details) => { details.open = true })")
    box = page.locator("#mask").bounding_box()
    page.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert page.get_by_role("button", name="Undo").is_enabled()
    page.locator("#remove-start").tap()
    card = draw(page, "wordwithoutanend" * 20, steps=2, num_images=8)
    wait_state(card, "complete")
    wide = page.evaluate(
        "() => [...document.querySelectorAll('body *')].filter((each) => each.checkVisibility() && !each.closest("
        "'.unseen, .skip, .strip, .easel') && each.getBoundingClientRect().right > innerWidth + 0.5)"
        ".map((each) => each.outerHTML.slice(0, 80))"
    )
    assert wide == []
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_a_deleted_job_is_gone(page, process):
    card = draw(page, steps=2)
    wait_state(card, "complete")
    job_id = card.get_attribute("data-job")
    card.get_by_role("button", name="Delete").click()
    page.locator("#confirm").get_by_role("button", name="Keep").click()
    assert process.client.get(f"/v1/jobs/{job_id}").status_code == 200
    card.get_by_role("button", name="Delete").click()
    page.locator("#confirm").get_by_role("button", name="Delete").click()
    card.wait_for(state="detached")
    assert process.client.get(f"/v1/jobs/{job_id}").status_code == 404


def test_the_gallery_is_there_after_a_restart(visit, process, folder):
    page = visit(process.url)
    page.wait_for_selector("#status[data-state=ready]")
    wait_state(draw(page, seed=9, steps=8), "complete")
    card = page.locator(".card").first
    before, count = seen(card), page.locator(".card").count()
    page.close()
    assert process.stop() == 0
    second = Process("--data-dir", str(folder))  # the gallery does not wait for the model
    page = visit(second.url, expected=["status of 503"])
    page.locator(".card").first.wait_for()
    assert page.locator(".card").count() == count
    inside = np.s_[9:-9]  # at a rounded corner a browser blends a little differently from one time to another
    np.testing.assert_array_equal(seen(page.locator(".card").first)[inside], before[inside])
    page.close()  # which would ask a server that is gone
    second.stop()


def test_a_key_is_asked_for_and_kept_for_the_tab(serve, visit):
    server = serve(api_key=[KEY])
    server.wait(server.submit(seed=1, width=256, height=256), "complete")
    page = visit(server.url, expected=["status of 401"])
    key = page.get_by_label("API key")
    for given in ("wrong", KEY):
        key.fill(given)
        page.keyboard.press("Enter")
        if given != KEY:
            page.get_by_text("The server doesn't know this key.").wait_for()
    card = page.locator(".card").first
    wait_state(card, "complete")
    assert tuple(seen(card)[9, 9]) == (37, 91, 151)
    page.reload()
    wait_state(card, "complete")
    wait_state(draw(page, steps=2), "complete")
    assert page.evaluate("localStorage.length") == 0


def test_a_prompt_is_text_whatever_it_holds(visit, server):
    page = visit(server.url)
    page.wait_for_selector("#status[data-state=ready]")
    hostile = '<img src=x onerror="document.title=1"><script>document.title=2</script>"\'&amp;'
    card = draw(page, hostile, negative_prompt=hostile, steps=2)
    wait_state(card, "complete")
    assert card.locator(".prompt").inner_text() == hostile
    assert page.title() == "sdjax"


def test_what_is_no_fields_fault_is_said_by_the_button(serve, visit):
    server = serve(queue_limit=1)
    server.engine.go.clear()
    server.wait(server.submit(), "running")
    server.submit()
    page = visit(server.url, expected=["status of 429"])
    page.wait_for_selector("#status[data-state=ready]")
    page.locator("#prompt").fill("a circle")
    page.locator("#draw").click()
    page.locator("#form-problem").filter(has_text="try again in").wait_for()
    server.engine.go.set()


def test_many_waiting_jobs_leave_the_page_its_connections(visit, server):
    server.engine.go.clear()
    jobs = [server.submit(seed=seed) for seed in range(12)]
    page = visit(server.url)
    page.wait_for_selector("#status[data-state=ready]")
    page.locator(".card").nth(11).wait_for()
    page.locator(f"[data-job='{jobs[11]}']").get_by_role("button", name="Cancel").click()
    wait_state(page.locator(f"[data-job='{jobs[11]}']"), "cancelled")
    server.engine.go.set()
    for job_id in jobs[:11]:
        wait_state(page.locator(f"[data-job='{job_id}']"), "complete")


def test_on_a_phone_those_who_wait_leave_room_for_those_who_are_done(visit, server):
    server.engine.go.clear()
    jobs = [server.submit(seed=seed) for seed in range(2)]
    page = visit(server.url, **PHONE)
    frame = card_of(page, jobs[1]).locator(".frame")
    box = frame.bounding_box()
    assert box["height"] < box["width"] / 4
    server.engine.go.set()
    wait_state(card_of(page, jobs[1]), "complete")
    box = frame.bounding_box()
    assert abs(box["height"] - box["width"]) < 4


def test_older_jobs_come_a_page_at_a_time(visit, server):
    jobs = [server.submit(seed=seed, steps=1) for seed in range(30)]
    server.wait(jobs[-1], "complete")
    page = visit(server.url)
    page.locator(".card").nth(23).wait_for()
    assert page.locator(".card").count() == 24
    page.get_by_role("button", name="Show older").click()
    page.locator(f"[data-job='{jobs[0]}']").wait_for()
    shown = page.locator(".card").evaluate_all("cards => cards.map((card) => card.dataset.job)")
    assert shown[:30] == jobs[::-1]


def test_the_policy_lets_no_other_script_run(server):
    answer = server.client.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self';" in policy
    assert "unsafe" not in policy
    assert answer.headers["cache-control"] == "no-cache"
    assert server.client.get("/page.js").headers["content-type"].startswith("text/javascript")
    assert (
        server.client.get(
            "/page.js", headers={"If-None-Match": server.client.get("/page.js").headers["etag"]}
        ).status_code
        == 304
    )
