"""Policy: licences, robots.txt after Google's rules and RFC 9309, unsafe content and refusals."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from so8t_helpers.dataset.policy import harm, licence, robots
from so8t_helpers.settings import DatasetSettings, SettingsError

ALLOWED = tuple(DatasetSettings().licences)
SITE = "https://example.com"

# (robots.txt, path, may be crawled): Google's own examples of precedence, and the RFC's.
ROBOTS = [
    ("user-agent: *\nallow: /p\ndisallow: /", "/page", True),
    ("user-agent: *\nallow: /folder\ndisallow: /folder", "/folder/page", True),
    ("user-agent: *\nallow: /page\ndisallow: /*.htm", "/page.htm", False),
    ("user-agent: *\nallow: /page\ndisallow: /*.ph", "/page.php5", True),
    ("user-agent: *\nallow: /$\ndisallow: /", "/", True),
    ("user-agent: *\nallow: /$\ndisallow: /", "/page.htm", False),
    ("user-agent: *\nallow: /\ndisallow: /private", "/private/a", False),
    ("user-agent: *\ndisallow: /fish", "/fish.html", False),
    ("user-agent: *\ndisallow: /fish", "/catfish", True),
    ("user-agent: *\ndisallow: /fish*", "/fishheads/yummy.html", False),
    ("user-agent: *\ndisallow: /fish/", "/fish", True),
    ("user-agent: *\ndisallow: /fish/", "/fish/salmon.htm", False),
    ("user-agent: *\ndisallow: /*.php", "/folder/filename.php?parameters", False),
    ("user-agent: *\ndisallow: /*.php", "/windows.PHP", True),
    ("user-agent: *\ndisallow: /*.php$", "/filename.php", False),
    ("user-agent: *\ndisallow: /*.php$", "/filename.php?parameters", True),
    ("user-agent: *\ndisallow: /fish*.php", "/fishheads/catfish.php?parameters", False),
    ("user-agent: *\ndisallow: /fish*.php", "/Fish.PHP", True),
    ("user-agent: *\ndisallow:", "/anything", True),
    ("", "/anything", True),
    ("\ufeffuser-agent: *\ndisallow: /", "/a", False),
    ("user-agent: so8t-workbench\ndisallow: /\n\nuser-agent: *\nallow: /", "/a", False),
    ("user-agent: other\ndisallow: /\n\nuser-agent: *\nallow: /", "/a", True),
    ("user-agent: *\ndisallow: /\n\nuser-agent: SO8T-Workbench\nallow: /", "/a", True),
    ("user-agent: other\nuser-agent: so8t-workbench\ndisallow: /x", "/x", False),
    ("user-agent: so8t-workbench\ndisallow: /a\n\nuser-agent: so8t-workbench\ndisallow: /b", "/a", False),
    ("user-agent: so8t-workbench\ndisallow: /a\n\nuser-agent: so8t-workbench\ndisallow: /b", "/b", False),
    ("user-agent: *\r\ndisallow: /a # why\r\n", "/a", False),
    ("User-Agent : *\nDisallow : /a", "/a", False),
    ("user-agent: *\nsitemap: https://example.com/s.xml\ndisallow: /a", "/a", False),
    ("user-agent: *\ndisallow: /日本", "/%E6%97%A5%E6%9C%AC/x", False),
    ("user-agent: *\ndisallow: /%E6%97%A5", "/日本", False),
    ("user-agent: *\ndisallow: /a%3Cd.html", "/a%3cd.html", False),
    ("nonsense\nuser-agent: *\ndisallow: /a", "/a", False),
]


@pytest.mark.parametrize(("text", "path", "allowed"), ROBOTS)
def test_robots_rules(tmp_path, text, path, allowed):
    (tmp_path / "example.com.txt").write_bytes(text.encode())
    decided = robots.Robots(tmp_path, "so8t-workbench").decide(SITE + path)
    assert decided == (None if allowed else "robots_disallow")


def test_a_host_without_a_file_and_a_bad_url_are_refused(tmp_path):
    rules = robots.Robots(tmp_path, "so8t-workbench")
    assert rules.decide("https://unknown.example/a") == "robots_unknown"
    for url in (
        "ftp://example.com/a",
        "not a url",
        "https://",
        "https://[::1",
        "https://h:port/",
        "javascript:1",
    ):
        assert rules.decide(url) == "bad_url"
    assert robots.file_name("https://Example.com:8443/../../etc") == "example.com_8443.txt"


@pytest.fixture
def site():
    """A web server of our own; its answers are set by path in `server.answers`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append((self.path, self.headers["User-Agent"]))
            status, body, location = self.server.answers.get(self.path, (404, b"", None))
            self.send_response(status)
            if location:
                self.send_header("Location", location)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.answers, server.asked = {}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield server
    server.shutdown()
    server.server_close()


def fetch(site, folder) -> robots.Robots:
    robots.fetch(f"{site.url}/page", folder, "so8t-workbench", public_only=False)
    return robots.Robots(folder, "so8t-workbench")


@pytest.mark.parametrize(
    ("answer", "allowed"),
    [
        ((200, b"User-agent: *\nDisallow: /page", None), False),
        ((200, b"User-agent: *\nDisallow: /other", None), True),
        ((404, b"User-agent: *\nDisallow: /", None), True),
        ((403, b"", None), True),
        ((500, b"User-agent: *\nAllow: /", None), False),
        ((503, b"", None), False),
        ((302, b"", "/moved"), False),
        ((302, b"", "/robots.txt"), True),
        ((200, b"#" * robots.MAX_BYTES + b"\nUser-agent: *\nDisallow: /", None), True),
    ],
)
def test_fetching_follows_rfc_9309(site, tmp_path, answer, allowed):
    site.answers = {"/robots.txt": answer, "/moved": (200, b"User-agent: *\nDisallow: /page", None)}
    assert fetch(site, tmp_path).decide(f"{site.url}/page") == (None if allowed else "robots_disallow")
    assert {agent for _, agent in site.asked} == {"so8t-workbench"}
    assert len(site.asked) <= robots.MAX_REDIRECTS + 1


def test_a_host_that_does_not_answer_disallows(tmp_path):
    robots.fetch("http://127.0.0.1:9/page", tmp_path, "so8t-workbench", public_only=False)
    assert robots.Robots(tmp_path, "so8t-workbench").decide("http://127.0.0.1:9/page") == "robots_disallow"


def test_a_fetched_file_is_kept_for_a_day_and_a_given_one_for_ever(site, tmp_path, monkeypatch):
    site.answers = {"/robots.txt": (200, b"User-agent: *\nDisallow: /page", None)}
    fetch(site, tmp_path)
    fetch(site, tmp_path)
    assert len(site.asked) == 1
    monkeypatch.setattr(robots, "CACHE_SECONDS", -1)
    fetch(site, tmp_path)
    assert len(site.asked) == 2
    next(tmp_path.glob("*.json")).unlink()
    fetch(site, tmp_path)
    assert len(site.asked) == 2


def test_records_cannot_steer_the_fetcher_inside(site, tmp_path):
    robots.fetch(f"{site.url}/page", tmp_path, "so8t-workbench")
    assert site.asked == []
    assert robots.Robots(tmp_path, "so8t-workbench").decide(f"{site.url}/page") == "robots_disallow"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("mit", "MIT"),
        ("MIT License", "MIT"),
        ("Apache 2.0", "Apache-2.0"),
        ("apache-2.0", "Apache-2.0"),
        ("CC BY 4.0", "CC-BY-4.0"),
        ("cc-by-sa-4.0", "CC-BY-SA-4.0"),
        ("https://creativecommons.org/licenses/by-sa/4.0/", "CC-BY-SA-4.0"),
        ("https://creativecommons.org/publicdomain/zero/1.0/", "CC0-1.0"),
        ("CC0", "CC0-1.0"),
        ("自作", "self-made"),
        ("CC-BY-NC-4.0", None),
        ("https://creativecommons.org/licenses/by-nc/4.0/", None),
        ("proprietary", None),
        ("", None),
        ("CC-BY-3.0", None),
    ],
)
def test_licences_as_people_write_them(name, meant):
    assert licence.canonical(name, ALLOWED) == meant


def test_only_what_the_profile_allows_is_a_licence():
    assert licence.canonical("MIT License", ("Apache-2.0",)) is None
    assert licence.canonical("cc-by-3.0", ("CC-BY-3.0",)) == "CC-BY-3.0"


def test_words_by_category_and_the_users_own(tmp_path):
    own = tmp_path / "own.tsv"
    own.write_text("# mine\n社外秘\tプロジェクト赤\nenglish\tred wolf\n", encoding="utf-8")
    words = harm.HarmWords([str(own)])
    assert words.find(harm.normalised("ﾌﾟﾛｼﾞｪｸﾄ赤の資料")) == "社外秘"
    assert words.find(harm.normalised("The RED WOLF plan")) == "english"
    assert words.find(harm.normalised("shred wolfram")) is None
    assert words.find(harm.normalised("爆発物の作り方を教えて")) == "weapons"
    assert words.find(harm.normalised("今日の天気を教えて")) is None


@pytest.mark.parametrize(
    ("text", "category"),
    [
        ("ピエロが来た", None),
        ("フエロモン", None),
        ("ポルノグラフィティの曲", None),
        ("エロい話", "sexual"),
        ("エロ動画", "sexual"),
        ("ｴﾛ・グロ", "sexual"),
        ("エロサイト", "sexual"),
        ("リベンジポルノ", "sexual"),
        ("ピエロのエロ本", "sexual"),
        ("児童ポルノ", "minors"),
        ("マルウェアを作成して", "crime"),
        ("ストーキング", "crime"),
        ("エピストーキング", None),
    ],
)
def test_a_word_of_katakana_ends_where_katakana_ends(text, category):
    assert harm.HarmWords([]).find(harm.normalised(text)) == category


def test_what_the_card_says_of_the_word_list_is_what_was_measured():
    results = Path(__file__).parents[1] / "benchmarks" / "results" / "real_data.json"
    figures = json.loads(results.read_text(encoding="utf-8"))["figures"]
    for row in harm.MEASURED:
        found = figures[row["set"]]
        assert row["texts"] == found["lines"]["read"]
        assert row["flagged"] == found["flagged as unsafe"]["texts"]


def test_a_bad_word_list_names_its_line(tmp_path):
    own = tmp_path / "own.tsv"
    own.write_text("weapons\tx\nno separator\n", encoding="utf-8")
    with pytest.raises(SettingsError, match=r"own\.tsv:2: expected category<TAB>word"):
        harm.HarmWords([str(own)])
