"""Who may use the editor: people who cannot see colours or hold a mouse, and those who know the password."""

import urllib.error
import urllib.parse
import urllib.request

import pytest

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

# What Gradio 6.31 itself gets wrong: names of empty places, of the picture's button, of thumbnails; colours of code.
GRADIO = [["[aria-label='Empty value']"], ["#picture .image-container"], ["#gallery"], [".cm-editor"]]


LOOKS = {  # colours, size, tabs
    "light": ("light", (1400, 1000), ("Picture", "Maps", "Losses", "Recipe")),
    "dark": ("dark", (1400, 1000), ("Recipe", "Maps")),
    "phone": ("light", (390, 844), ("Picture",)),
}


def test_axe_finds_no_fault_of_ours(editor):
    """In light and dark, and on a phone, with methods, an open table and results."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python").Axe()
    page = editor.page
    page.locator("svg.stage").scroll_into_view_if_needed()
    editor.region("a red circle", (0.1, 0.1, 0.5, 0.4))
    page.locator("#canvas summary").click()
    editor.add_method("bacon")
    editor.add_method("soft-pag")
    for closed in page.locator("#knobs details summary").all():
        closed.click()
    editor.fill("steps", "2")
    editor.draw()
    found = set()
    for look, (scheme, (width, height), tabs) in LOOKS.items():
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": height})
        page.wait_for_function("dark => document.body.classList.contains('dark') === dark", arg=scheme == "dark")
        for tab in tabs:
            editor.tab(tab)
            page.wait_for_timeout(300)  # it fades in, and half a colour has half a contrast
            for fault in axe.run(page, context={"exclude": GRADIO}).response["violations"]:
                found |= {f"{look}, {tab}: {fault['id']}: {node['html'][:150]}" for node in fault["nodes"]}
    assert not found


@pytest.fixture(scope="module")
def guarded(served, tmp_path_factory):
    """The address of an editor that asks for a password."""
    from diffguide.app import server

    folder = tmp_path_factory.mktemp("guarded")
    demo, url = server.serve(["shapes-unet"], output=folder, device="cpu", auth=["ann:a long word"], wait=False)
    yield url
    demo.close(verbose=False)


def status(request):
    try:
        return urllib.request.urlopen(request, timeout=60).status
    except urllib.error.HTTPError as fault:
        return fault.code


def post(url, fields):
    return urllib.request.Request(url, urllib.parse.urlencode(fields).encode())


def test_who_has_no_password_gets_nothing(guarded):
    for path in ("config", "gradio_api/info", "gradio_api/file=secret.png"):
        assert status(guarded + path) == 401
    call = urllib.request.Request(
        guarded + "gradio_api/call/methods", b'{"data": []}', {"Content-Type": "application/json"}
    )
    assert status(call) == 401
    assert status(post(guarded + "login", {"username": "ann", "password": "a short word"})) == 400
    assert status(post(guarded + "login", {"username": "ann", "password": "a long word"})) == 200


def test_the_client_logs_in(guarded):
    from gradio_client import Client

    client = Client(guarded, auth=("ann", "a long word"), verbose=False)
    assert client.predict(api_name="/methods")["methods"]
