//! What is looked at, and what is to be seen.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use small_vmm::driver::RequestType::{Plug, Unplug};

use crate::chromium::Chromium;
use crate::device::{BLOCK, Device};
use crate::ui::Ui;
use crate::{Programs, picture};

const REGION: u64 = 1 << 30;

/// Elements that the page may have, whatever the region: the list of events has 100 of 3 each.
const ELEMENTS: u64 = 600;

/// Every text that is less clear than WCAG's AA asks for: 4.5 to 1.
const DIM_TEXTS: &str = r#"(() => {
  const channel = (value) => (value /= 255) <= .04045 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4;
  const light = (color) => {
    const [r, g, b] = color.match(/[\d.]+/g).map(Number);
    return .2126 * channel(r) + .7152 * channel(g) + .0722 * channel(b);
  };
  const ground = (element) => {
    for (; element; element = element.parentElement) {
      const color = getComputedStyle(element).backgroundColor;
      if (!/, 0\)$/.test(color)) return color;
    }
    return "rgb(255, 255, 255)";
  };
  return [...document.querySelectorAll("body *")]
    .filter((element) => element.checkVisibility() && [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()))
    .filter((element) => {
      const [a, b] = [light(getComputedStyle(element).color), light(ground(element))];
      return (Math.max(a, b) + .05) / (Math.min(a, b) + .05) < 4.5;
    })
    .map((element) => `${element.tagName} ${element.id} ${element.textContent}`);
})()"#;

/// The colour of the map at a place, parts of its width and height, by its name in the style sheet.
fn color_at(across: f64, down: f64) -> String {
    format!(
        r##"(() => {{
          const map = document.getElementById("map");
          const [r, g, b] = map.getContext("2d").getImageData(map.width * {across}, map.height * {down}, 1, 1).data;
          const found = "#" + [r, g, b].map((part) => part.toString(16).padStart(2, "0")).join("");
          const style = getComputedStyle(map);
          const names = ["resident", "plugged", "discarded", "unusable", "stray"];
          return names.find((name) => style.getPropertyValue("--" + name) === found) ?? found;
        }})()"##
    )
}

fn text(id: &str) -> String {
    format!("document.getElementById({id:?}).textContent")
}

/// The names of what has a role.
fn names(nodes: &[&Value], role: &str) -> Value {
    let of_role = nodes.iter().filter(|node| node["role"]["value"] == role);
    of_role.map(|node| node["name"]["value"].clone()).collect()
}

pub struct Looks {
    browser: Chromium,
    programs: Programs,
    out: PathBuf,
}

impl Looks {
    pub fn new(browser: Chromium, programs: Programs, out: PathBuf) -> Self {
        Self { browser, programs, out }
    }

    /// A device and its page's address, with nothing left in the browser of the one before.
    fn device(&mut self, region_size: u64) -> Result<(Device, Ui)> {
        self.browser.open("about:blank")?;
        self.browser.complaints()?;
        let device = Device::start(&self.programs.daemon, region_size)?;
        let ui = Ui::start(&self.programs.vmemctl, &device.daemon.api_socket())?;
        Ok((device, ui))
    }

    fn sees(&mut self, id: &str, expected: &str) -> Result<()> {
        self.browser.wait(&text(id), &json!(expected))
    }

    fn sees_event(&mut self, expected: &str) -> Result<()> {
        let listed = format!(
            "[...document.querySelectorAll('#events span')].some((line) => line.textContent === {expected:?})"
        );
        self.browser.wait(&listed, &json!(true))
    }

    fn take_picture(&mut self, name: &str) -> Result<()> {
        self.browser.screenshot(&picture(&self.out, name))
    }

    /// In dark and light and on a narrow screen: text is clear, and nothing sticks out.
    fn looks_good(&mut self, name: &str) -> Result<()> {
        for (kind, width, height, dark) in
            [("light", 1200, 900, false), ("dark", 1200, 900, true), ("narrow", 390, 844, false)]
        {
            self.browser.screen(width, height, dark)?;
            // The map was drawn anew for the screen.
            self.browser.wait("document.getElementById('map').width > 0 && new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))", &json!(true))?;
            let dim = self.browser.evaluate(DIM_TEXTS)?;
            ensure!(dim == json!([]), "{kind}: texts that are hard to read: {dim}");
            let wide = self.browser.evaluate("document.documentElement.scrollWidth")?;
            ensure!(
                wide.as_u64() <= Some(width.into()),
                "{kind}: the page is {wide} wide, of {width}"
            );
            self.take_picture(&format!("{name}-{kind}"))?;
        }
        self.browser.screen(1200, 900, false)
    }

    /// Neither the page's policy nor its script had anything to complain about.
    fn is_quiet(&mut self) -> Result<()> {
        let complaints = self.browser.complaints()?;
        ensure!(complaints.is_empty(), "the browser complains: {complaints:?}");
        Ok(())
    }

    pub fn a_guest(&mut self) -> Result<()> {
        let (mut device, ui) = self.device(REGION)?;
        self.browser.screen(1200, 900, false)?;
        self.browser.open(&ui.url)?;
        self.sees("link", "live")?;
        self.sees("region", "1 GiB")?;
        self.sees("front-end", "front-end connected")?;
        self.sees("progress-text", "The guest has plugged what is requested, 0 B.")?;
        let address = self.browser.evaluate("location.href")?;
        ensure!(address == json!(ui.bare()), "the token stays in the address: {address}");

        // A resize meanwhile: seen at once, and not done yet.
        device.resize(512 << 20)?;
        self.sees("requested", "512 MiB")?;
        self.sees_event("requested size: 512 MiB")?;
        self.browser.wait(&color_at(0.001, 0.001), &json!("discarded"))?;
        self.sees(
            "progress-text",
            "512 MiB to plug; no change by the guest since this page was opened.",
        )?;
        device.request(Plug, &(0..96).map(|block| (block, 1)).collect::<Vec<_>>())?;
        self.sees("plugged", "192 MiB")?;
        self.sees_event("plugged size: 192 MiB")?;
        self.browser.wait(&color_at(0.001, 0.001), &json!("plugged"))?;
        self.browser.wait(
            &format!(
                "/^320 MiB to plug; about .* at the present rate.$/.test({})",
                text("progress-text")
            ),
            &json!(true),
        )?;
        device.write(0, 32)?;
        self.sees("resident", "64 MiB")?;
        self.browser.wait(&color_at(0.001, 0.001), &json!("resident"))?;
        device.request(Plug, &(96..256).map(|block| (block, 1)).collect::<Vec<_>>())?;
        self.sees("plugged", "512 MiB")?;
        self.sees("progress-text", "The guest has plugged what is requested, 512 MiB.")?;
        device
            .request(Unplug, &(64..128).step_by(4).map(|block| (block, 2)).collect::<Vec<_>>())?;
        self.sees("plugged", "448 MiB")?;
        // A guest that uses what it may not.
        device.touch(300)?;
        self.browser.wait(&color_at(44.5 / 64.0, 4.5 / 8.0), &json!("stray"))?;
        self.browser.wait(&color_at(63.5 / 64.0, 7.1 / 8.0), &json!("unusable"))?;
        ensure!(device.daemon.api().set_migration(true)?.is_success(), "migration is refused");
        self.sees("migration", "migration: blocks frozen")?;
        self.sees("progress-text", "64 MiB to plug; blocks are frozen while migration is active.")?;
        self.sees_event("migration: active")?;
        self.keyboard()?;
        self.looks_good("guest")?;
        ensure!(device.daemon.api().set_migration(false)?.is_success(), "migration is refused");
        self.browser.wait("document.getElementById('migration').hidden", &json!(true))?;

        device.resize(0)?;
        let all = (0..256).filter(|block| !(64..128).contains(block) || block % 4 > 1);
        device.request(Unplug, &all.map(|block| (block, 1)).collect::<Vec<_>>())?;
        self.sees("plugged", "0 B")?;
        self.browser.wait(&color_at(0.001, 0.001), &json!("discarded"))?;
        device.disconnect();
        self.sees("front-end", "no front-end")?;
        self.sees("resident-note", "guest memory is not mapped")?;
        self.sees_event("front-end: not connected")?;
        device.connect()?;
        self.sees("front-end", "front-end connected")?;
        self.is_quiet()
    }

    /// What the map and the chart show, by keyboard and for screen readers.
    fn keyboard(&mut self) -> Result<()> {
        self.browser.evaluate("document.getElementById('map').focus()")?;
        self.browser.press("ArrowRight")?;
        self.browser.press("ArrowRight")?;
        let expected =
            format!("{:#012x}, 2 MiB: 2 MiB plugged, 2 MiB resident", 0x1_4000_0000 + BLOCK);
        self.sees("map-readout", &expected)?;
        self.browser.press("End")?;
        let expected = format!(
            "{:#012x}, 2 MiB: 0 B plugged, 0 B resident, not usable yet",
            0x1_8000_0000 - BLOCK
        );
        self.sees("map-readout", &expected)?;
        // The chart has a sample each second.
        self.browser.wait(
            "document.getElementById('chart').ariaLabel.includes('now 448 MiB')",
            &json!(true),
        )?;
        let tree = self.browser.call("Accessibility.getFullAXTree", json!({}))?;
        let nodes: Vec<&Value> = tree["nodes"].as_array().into_iter().flatten().collect();
        for (role, name) in [
            ("image", "Map of the region of 1 GiB: 448 MiB plugged, 64 MiB resident."),
            ("image", "Sizes over time; now 448 MiB of the requested 512 MiB are plugged."),
            ("progressbar", "Plugged of the requested size"),
            ("heading", "Events"),
        ] {
            let told = nodes
                .iter()
                .any(|node| node["role"]["value"] == role && node["name"]["value"] == name);
            ensure!(told, "no {role} is called {name:?}: {}", names(&nodes, role));
        }
        Ok(())
    }

    pub fn strangers(&mut self) -> Result<()> {
        let (_device, ui) = self.device(REGION)?;
        self.browser.open("about:blank")?;
        // Another origin, which even knows the token.
        let fetch = |options: &str| {
            format!(
                "fetch('{}v1/device', {options}).then((answer) => answer.status, () => 'refused')",
                ui.bare()
            )
        };
        let header = format!("{{ headers: {{ authorization: 'Bearer {}' }} }}", ui.token());
        for options in ["{}", "{ mode: 'no-cors' }", header.as_str()] {
            let answer = self.browser.evaluate(&fetch(options))?;
            // Of no-cors only its status is told, and that as 0.
            ensure!(answer == json!("refused") || answer == json!(0), "{options}: {answer}");
        }
        let framed = format!(
            "document.body.append(Object.assign(document.createElement('iframe'), {{ src: '{}' }}))",
            ui.bare()
        );
        self.browser.evaluate(&framed)?;
        self.browser.wait("frames[0] && (() => { try { return !frames[0].document.getElementById('map'); } catch { return true; } })()", &json!(true))?;
        // The page itself, in a tab that has no token.
        self.browser.open(ui.bare())?;
        self.sees("link", "not connected")?;
        let trouble = "Open this page with the address that “vmemctl ui” printed: it has a token that this tab lacks.";
        self.sees("trouble", trouble)?;
        self.sees("region", "–")?;
        self.looks_good("stranger")?;
        self.browser.complaints().map(drop)
    }

    pub fn the_daemon_away(&mut self) -> Result<()> {
        let (mut device, ui) = self.device(REGION)?;
        device.resize(256 << 20)?;
        device.request(Plug, &[(0, 64)])?;
        self.browser.open(&ui.url)?;
        self.sees("plugged", "128 MiB")?;
        self.browser.wait(&color_at(0.001, 0.001), &json!("plugged"))?;
        device.daemon.kill()?;
        self.sees("link", "not connected")?;
        // What it showed last is still there, and does not pass for the present.
        self.sees("plugged", "128 MiB")?;
        self.browser.wait("document.getElementById('front-end').hidden", &json!(true))?;
        self.browser.wait(&format!("/^As of /.test({})", text("progress-text")), &json!(true))?;
        self.browser.wait(
            &format!("{}.includes('Cannot reach the daemon')", text("trouble")),
            &json!(true),
        )?;
        self.take_picture("away")?;
        device.daemon.restart()?;
        self.sees("link", "live")?;
        self.browser.wait("document.getElementById('trouble').hidden", &json!(true))?;
        self.sees("front-end", "no front-end")?;
        device.connect()?;
        device.request(Plug, &[(64, 64)])?;
        self.sees("plugged", "256 MiB")?;
        self.browser.complaints().map(drop)
    }

    /// As many ranges as such a region can have; the page stays as small as for any other.
    pub fn tatters(&mut self) -> Result<()> {
        const TIB: u64 = 1 << 40;
        let (mut device, ui) = self.device(TIB)?;
        device.resize(TIB / 2)?;
        let blocks = TIB / 2 / BLOCK;
        let runs: Vec<(u64, u16)> = (0..blocks).step_by(2).map(|block| (block, 1)).collect();
        device.request(Plug, &runs)?;
        self.browser.open(&ui.url)?;
        self.sees("region", "1 TiB")?;
        self.sees("plugged", "256 GiB")?;
        // Each cell of what is plugged is half full.
        let columns = 64.0;
        let row = 1.0 / 32.0;
        for across in [0.5 / columns, 32.5 / columns, 63.5 / columns] {
            self.browser.wait(&color_at(across, row * 0.7), &json!("plugged"))?;
            self.browser.wait(&color_at(across, row * 0.2), &json!("discarded"))?;
        }
        let elements = self.browser.evaluate("document.getElementsByTagName('*').length")?;
        ensure!(elements.as_u64() < Some(ELEMENTS), "the page has {elements} elements");
        self.looks_good("tatters")?;
        device.request(Plug, &[(1, 1)])?;
        self.sees_event("plugged size: 256 GiB")?;
        self.is_quiet()
    }
}
