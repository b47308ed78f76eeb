"""`ktmoe webui`: LLaMA-Factory's page in a browser, whose training ends with LoRA of the routed experts."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request

import pytest
from factory import save_model
from helpers import free_port
from safetensors import safe_open
from typer.testing import CliRunner

from ktmoe.cli import app
from ktmoe.llamafactory import shipped


CHROME, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
LACKS = [name for name in ("gradio", "selenium") if importlib.util.find_spec(name) is None]
LACKS += [name for name, path in (("chromium", CHROME), ("chromedriver", DRIVER)) if path is None]
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1300,3000"
)
EXTRA = {"optim": "adamw_torch", "use_kt": True, "kt_backend": "torch", "use_cpu": True, "max_steps": 2}


@pytest.mark.skipif("gradio" not in LACKS, reason="gradio is installed")
def test_without_gradio_the_remedy_is_said():
    done = CliRunner().invoke(app, ["webui"])
    assert done.exit_code == 2
    assert "pip install 'gradio>=4.38,<=5.50'" in " ".join(done.output.split())


@pytest.fixture
def page(tmp_path):
    """The page's address; it is served from `tmp_path`."""
    port = free_port()
    env = os.environ | {
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "BROWSER": "true",  # a command that does nothing: the page is not to be opened here
    }
    command = [sys.executable, "-m", "ktmoe.cli", "webui"]
    with (tmp_path / "page.log").open("w") as log:
        server = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=log)
    try:
        for _ in range(120):
            time.sleep(0.5)
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "page.log").read_text()
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait(20)


class Browser:
    """Fields and buttons by what is written beside them."""

    def __init__(self, address):
        from selenium.webdriver import Chrome
        from selenium.webdriver.chrome.options import Options
        from selenium.webdriver.chrome.service import Service

        options = Options()
        options.binary_location = CHROME
        for flag in FLAGS.split():
            options.add_argument(flag)
        self.driver = Chrome(options=options, service=Service(DRIVER))
        self.driver.get(address)

    def field(self, label):
        script = """
        const fields = [...document.querySelectorAll('input,textarea')].filter(e => e.offsetParent);
        return fields.find(e => e.closest('.block')?.querySelector('span')?.innerText == arguments[0])"""
        return self.wait(lambda: self.driver.execute_script(script, label))

    def write(self, label, value):
        from selenium.webdriver.common.keys import Keys

        field = self.field(label)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(value, Keys.TAB if field.tag_name == "textarea" else Keys.ENTER)
        time.sleep(1)  # the page asks the server what follows

    def press(self, text):
        script = """
        const buttons = [...document.querySelectorAll('button')].filter(e => e.offsetParent);
        const found = buttons.filter(e => e.innerText.trim().startsWith(arguments[0]));
        found.at(-1)?.click(); return found.length"""
        self.wait(lambda: self.driver.execute_script(script, text))
        time.sleep(1)

    def text(self):
        return self.driver.execute_script("return document.body.innerText")

    def wait(self, found, seconds=60):
        end = time.monotonic() + seconds
        while not (value := found()):
            assert time.monotonic() < end, self.text()
            time.sleep(0.5)
        return value


@pytest.mark.slow  # in `nox -s webui`
@pytest.mark.skipif(bool(LACKS), reason=f"the page NOT tried on this host: {', '.join(LACKS)} not installed")
def test_a_training_from_the_page(page, tmp_path):
    save_model(tmp_path / "model")
    browser = Browser(page)
    try:
        browser.write("Model name", "Custom")
        browser.write("Model path", str(tmp_path / "model"))
        browser.write("Data dir", str(shipped.DATA))
        browser.write("Dataset", "identity")
        browser.press("Extra configurations")
        browser.write("Extra arguments", json.dumps(EXTRA))
        browser.press("Preview command")
        browser.wait(lambda: "ktmoe train" in browser.text())
        browser.press("Start")
        runs = tmp_path / "saves"
        (state,) = browser.wait(lambda: list(runs.rglob("trainer_state.json")), 150)
        browser.wait(lambda: "Finished" in browser.text())
        browser.driver.save_screenshot(str(tmp_path / "page.png"))
    except BaseException:
        print((tmp_path / "page.log").read_text()[-3000:])
        raise
    finally:
        browser.driver.quit()
    assert json.loads(state.read_text())["global_step"] == 2
    with safe_open(state.parent / "adapter_model.safetensors", "pt") as file:
        assert any(".experts." in name for name in file.keys())
