#!/usr/bin/env python3
"""Looks a device up on the public pages in Chromium, with JavaScript disabled.

Recomputes the proof that the page shows and verifies the checkpoint's signature, with the third-party client's receipt.py.
Prints each verified step. Exit status 0 on success.
"""

import argparse
import base64
import hashlib
import json
import secrets
import shutil
import ssl
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

# From the third-party client in ../clients.
from receipt import Checkpoint, LogKey, Proof, ReceiptError, leaf_hash, node_hash

PATIENCE = 20  # seconds for a page or a download
DESKTOP, PHONE = 1280, 390  # CSS pixels
NONSENSE = "not a chip <b>&"
# A page that shows whether scripts run.
SCRIPT_PROBE = "data:text/html,<p id=probe>off</p><script>document.getElementById('probe').textContent='on'</script>"


class Wrong(Exception):
    """A page does not have the expected content."""


def require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise Wrong(otherwise)


def main() -> int:
    arguments = parse_arguments()
    try:
        with tempfile.TemporaryDirectory(prefix="spp-pages-", ignore_cleanup_errors=True) as folder:
            site = Site(arguments.url, arguments.ca, arguments.certificate)
            site.has_expected_headers()
            browser = Browser(site, Path(folder), arguments.screenshots)
            try:
                Visit(arguments, site, browser).run()
            finally:
                browser.close()
    except (Wrong, ReceiptError, WebDriverException, OSError) as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, metavar="https://HOST:PORT", help="the public listener")
    parser.add_argument("--ca", required=True, type=Path, help="the CA of the server's certificate (PEM)")
    parser.add_argument("--certificate", required=True, type=Path, help="the server's certificate (PEM)")
    parser.add_argument("--vkey", required=True, type=Path, help="the log's public key, not taken from the server")
    parser.add_argument("--expected", required=True, type=Path, help="the record, as printed by `spp-line show --json`")
    parser.add_argument("--screenshots", required=True, type=Path, metavar="DIR", help="directory for screenshots")
    return parser.parse_args()


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Site:
    """Accesses the server without a browser. Its certificate must be issued by the CA for this name."""

    def __init__(self, url: str, ca: Path, certificate: Path):
        self.url = url.rstrip("/")
        self.certificate = x509.load_pem_x509_certificate(certificate.read_bytes())
        self._tls = ssl.create_default_context(cafile=str(ca))

    def get(self, path: str) -> Answer:
        try:
            with urllib.request.urlopen(self.url + path, timeout=PATIENCE, context=self._tls) as answer:
                return Answer(answer.status, dict(answer.headers.items()), answer.read())
        except urllib.error.HTTPError as error:
            return Answer(error.code, dict(error.headers.items()), error.read())

    def key_pin(self) -> str:
        """Returns Chromium's SPKI pin: the base64 of the SHA-256 of the public key."""
        spki = self.certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return base64.b64encode(hashlib.sha256(spki).digest()).decode()

    def has_expected_headers(self) -> None:
        answer = self.get("/")
        require(answer.status == 200, f"the front page answers {answer.status}")
        headers = {name.lower(): value for name, value in answer.headers.items()}
        policy = headers.get("content-security-policy", "")
        require("default-src 'none'" in policy, f"the content security policy is {policy!r}")
        require("unsafe" not in policy and "script-src" not in policy, f"the policy allows scripts: {policy!r}")
        say("the CA issued the server's certificate; the content security policy forbids scripts and foreign content")


class Browser:
    """Chromium with its own profile, without JavaScript."""

    def __init__(self, site: Site, folder: Path, screenshots: Path):
        self.site = site
        self.downloads, self.screenshots = folder / "downloads", screenshots
        self.downloads.mkdir()
        screenshots.mkdir(parents=True, exist_ok=True)
        options = webdriver.ChromeOptions()
        options.binary_location = program("chromium")
        for argument in (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={folder / 'profile'}",
            # Chromium still refuses any other certificate; the CA of this one was verified above.
            f"--ignore-certificate-errors-spki-list={site.key_pin()}",
        ):
            options.add_argument(argument)
        preferences = {
            "profile.managed_default_content_settings.javascript": 2,
            "download.default_directory": str(self.downloads),
            "download.prompt_for_download": False,
        }
        options.add_experimental_option("prefs", preferences)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        service = webdriver.ChromeService(executable_path=program("chromedriver"))
        self.driver = webdriver.Chrome(options=options, service=service)
        self.driver.set_page_load_timeout(PATIENCE)
        self.look(DESKTOP, "light")

    def close(self) -> None:
        self.driver.quit()

    def open(self, path: str) -> None:
        self.driver.get(self.site.url + path)

    def find(self, element_id: str) -> WebElement | None:
        found = self.driver.find_elements(By.ID, element_id)
        return found[0] if found else None

    def wait_for(self, element_id: str) -> WebElement:
        seen = until(lambda: self.find(element_id))
        require(seen is not None, f"there is no #{element_id} on {self.driver.current_url} ({self.driver.title})")
        return seen

    def text(self, element_id: str) -> str:
        return self.wait_for(element_id).text.strip()

    def look(self, width: int, scheme: str) -> None:
        """Emulates a screen of this width and colour scheme."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        screen = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)

    def take_screenshots(self, name: str) -> None:
        """Takes full-page screenshots for desktop and phone, light and dark. No content may overflow on the right."""
        grounds = {}
        for width in (DESKTOP, PHONE):
            for scheme in ("light", "dark"):
                self.look(width, scheme)
                content = self.driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
                require(content["width"] <= width, f"{name} is {content['width']} px wide on a screen of {width}")
                clip = {"x": 0, "y": 0, "width": width, "height": content["height"], "scale": 1}
                picture = {"captureBeyondViewport": True, "clip": clip}
                data = self.driver.execute_cdp_cmd("Page.captureScreenshot", picture)["data"]
                (self.screenshots / f"{name}-{width}-{scheme}.png").write_bytes(base64.b64decode(data))
                page = self.driver.find_element(By.TAG_NAME, "html")
                grounds[scheme] = page.value_of_css_property("background-color")
        require(grounds["light"] != grounds["dark"], f"{name} has the same background in light and dark mode")
        self.look(DESKTOP, "light")

    def download(self, element_id: str) -> bytes:
        before = set(self.downloads.iterdir())
        self.wait_for(element_id).click()

        def finished() -> Path | None:
            new = [path for path in self.downloads.iterdir() if path not in before and not path.name.startswith(".")]
            whole = [path for path in new if path.suffix != ".crdownload"]
            return whole[0] if whole and len(whole) == len(new) else None

        path = until(finished)
        require(path is not None, f"#{element_id} downloads nothing")
        return path.read_bytes()

    def complaints(self) -> list[str]:
        """Returns Chromium's content security policy violations."""
        messages = [entry["message"] for entry in self.driver.get_log("browser")]
        return [message for message in messages if "Content Security Policy" in message]


class Visit:
    """A person's visit to the pages."""

    def __init__(self, arguments: argparse.Namespace, site: Site, browser: Browser):
        self.site, self.browser = site, browser
        self.expected = json.loads(arguments.expected.read_text())
        self.chip = self.expected["chip_id"]
        self.vkey = arguments.vkey.read_text().strip()
        self.log_key = LogKey.read(self.vkey.encode())
        self.certificate = x509.load_der_x509_certificate(bytes.fromhex(self.expected["certificate"]))

    def run(self) -> None:
        self.has_no_javascript()
        self.reads_the_front_page()
        self.looks_a_chip_up()
        self.reads_the_certificate()
        self.follows_the_proof()
        self.downloads_backup_and_certificate()
        self.types_nonsense()
        self.asks_for_an_unknown_chip()
        complaints = self.browser.complaints()
        require(not complaints, f"the pages violate their content security policy: {complaints[:1]}")
        say(f"no policy violations; screenshots are in {self.browser.screenshots}")

    def has_no_javascript(self) -> None:
        self.browser.driver.get(SCRIPT_PROBE)
        require(self.browser.text("probe") == "off", "JavaScript is enabled, so this test would prove nothing")
        say("JavaScript is off")

    def reads_the_front_page(self) -> None:
        self.browser.open("/")
        size = self.browser.text("log-size")
        index = self.expected["record_index"]
        require(number(size) > index, f"the log has {size}, and a record at {index}")
        shown = self.browser.text("log-key").replace("\n", "")
        require(shown == self.vkey, f"the page shows the log key {shown}, not {self.vkey}")
        self.first_tab_skips_to_the_content()
        self.browser.take_screenshots("front")
        say(f"the front page says that the log has {size}, and shows its public key")

    def first_tab_skips_to_the_content(self) -> None:
        self.browser.driver.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
        focused = self.browser.driver.switch_to.active_element
        require(focused.get_dom_attribute("href") == "#main", "the first Tab does not lead to the skip link")
        require(focused.rect["x"] >= 0, "the focused skip link is not visible")

    def looks_a_chip_up(self) -> None:
        field = self.browser.wait_for("chip")
        field.send_keys(self.chip, Keys.ENTER)
        identity = self.browser.text("identity")
        kind, value = self.expected["identity"].split(":", 1)
        require(value in identity and kind.casefold() in identity.casefold(), f"the page is of {identity!r}")
        require(self.browser.text("chip").replace("\n", "") == self.chip, "the page is of another chip")
        profile = self.browser.text("profile")
        require(profile == self.expected["profile"], f"the profile is {profile!r}")
        index = number(self.browser.text("index"))
        require(index == self.expected["record_index"], f"the record's place is {index}")
        shown = self.browser.text("record-hash").replace("\n", "")
        require(shown == self.expected["record_hash"], "the record's hash is another")
        self.browser.take_screenshots("device")
        say(f"typing a chip ID leads to {' '.join(identity.split())}, profile {profile}")

    def reads_the_certificate(self) -> None:
        rows = self.browser.driver.find_elements(By.CSS_SELECTOR, "#certificate-rows > div")
        shown = {row.find_element(By.TAG_NAME, "dt").text: row.find_element(By.TAG_NAME, "dd").text for row in rows}
        subject = next((value for name, value in shown.items() if name.casefold() == "subject"), "")
        for attribute in self.certificate.subject:
            require(attribute.value in subject, f"the certificate's subject is shown as {subject!r}")
        digits = "".join("".join(shown.values()).split()).replace(":", "").casefold()
        require(self.expected["certificate_serial"] in digits, "the certificate's serial number is not shown")
        say(f"the certificate's subject is {' '.join(subject.split())}")

    def follows_the_proof(self) -> None:
        verdict = self.browser.text("verdict")
        require(verdict.startswith("Verified"), f"the verdict is {verdict!r}")
        verdicts = [self.browser.text("root-verdict"), self.browser.text("signature-verdict")]
        require(verdicts == ["equal", "verified"], f"the proof's verdicts are {verdicts}")
        say("the page says that the proof is verified")

        record = self.site.get(f"/devices/{self.chip}/record").body
        require(hashlib.sha256(record).hexdigest() == self.expected["record_hash"], "the record's bytes are others")
        result = leaf_hash(record)
        require(result == self.hex("leaf"), "the leaf is not the record's")
        steps = self.browser.driver.find_elements(By.CSS_SELECTOR, "#steps tbody tr")
        for step in steps:
            side, *hashes = (cell.text for cell in step.find_elements(By.TAG_NAME, "td"))
            sibling, shown = (bytes.fromhex(text.replace("\n", "")) for text in hashes)
            require(side in ("left", "right"), f"a sibling stands {side!r}")
            result = node_hash(sibling, result) if side == "left" else node_hash(result, sibling)
            require(shown == result, "a step of the proof has another result")
        require(result == self.hex("result") == self.hex("root"), "the proof does not lead to the root")

        self.browser.wait_for("note").find_element(By.TAG_NAME, "summary").click()
        note = self.browser.wait_for("note").find_element(By.TAG_NAME, "pre").get_property("textContent")
        checkpoint = Checkpoint.verify(f"{note.rstrip()}\n".encode(), self.log_key)
        shown = Checkpoint(number(self.browser.text("proof-size")), result)
        require(checkpoint == shown, f"the checkpoint is of another tree, of {checkpoint.size}")
        say(f"recomputed: the record is in the signed tree of {shown.size}, {len(steps)} steps below its root")
        self.checks_the_proof_file(record)

    def checks_the_proof_file(self, record: bytes) -> None:
        proof = Proof.read(self.site.get(f"/devices/{self.chip}/proof").body)
        require(proof.index == self.expected["record_index"], f"the file proves the record at {proof.index}")
        # The file may have a newer checkpoint than the page.
        checkpoint = proof.verify(record, self.log_key)
        say(f"the proof file verifies in the tree of {checkpoint.size}")

    def hex(self, element_id: str) -> bytes:
        return bytes.fromhex(self.browser.text(element_id).replace("\n", ""))

    def downloads_backup_and_certificate(self) -> None:
        backup = self.browser.download("download-backup")
        published = bytes.fromhex(self.expected["backup_package"])
        require(hashlib.sha256(backup).digest() == hashlib.sha256(published).digest(), "the downloaded backup is another")
        data = self.browser.download("download-certificate")
        load = x509.load_pem_x509_certificate if data.startswith(b"-----") else x509.load_der_x509_certificate
        require(load(data) == self.certificate, "the downloaded certificate is another")
        say(f"backup ({len(backup)} bytes) and certificate can be downloaded, and are the device's")

    def types_nonsense(self) -> None:
        self.browser.open("/")
        self.browser.wait_for("chip").send_keys(NONSENSE)
        self.browser.wait_for("submit").click()
        problem = self.browser.text("problem")
        field = self.browser.wait_for("chip")
        require(field.get_dom_attribute("aria-invalid") == "true", "the field is not marked")
        described = (field.get_dom_attribute("aria-describedby") or "").split()
        require("problem" in described, "the field does not refer to the problem text")
        require(field.get_dom_attribute("value") == NONSENSE, "the form does not show the input again")
        self.browser.take_screenshots("problem")
        say(f"invalid input is reported at the field: {problem}")

    def asks_for_an_unknown_chip(self) -> None:
        unknown = secrets.token_hex(16)
        status = self.site.get(f"/devices/{unknown}").status
        require(status == 404, f"an unknown chip is answered with {status}")
        self.browser.open("/")
        self.browser.wait_for("chip").send_keys(unknown)
        self.browser.wait_for("submit").click()
        heading = self.browser.text("heading")
        self.browser.take_screenshots("not-found")
        self.browser.wait_for("home").click()
        self.browser.wait_for("look-up")
        say(f"an unknown chip is answered with 404: {heading}")


def number(text: str) -> int:
    """Parses the number in "1,234 records"."""
    digits = text.split(" ")[0].replace(",", "")
    require(digits.isdecimal(), f"no number in {text!r}")
    return int(digits)


def until(look: Callable):
    """Polls until the result is not None, or the time limit."""
    deadline = time.monotonic() + PATIENCE
    while True:
        seen = look()
        if seen is not None or time.monotonic() > deadline:
            return seen
        time.sleep(0.05)


def program(name: str) -> str:
    found = shutil.which(name)
    require(found is not None, f"{name} is missing; as root, run: apt-get install -y chromium chromium-driver")
    return found


def say(what: str) -> None:
    print(f"   ok: {what}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
