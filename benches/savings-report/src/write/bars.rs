//! The comparison with QEMU as bars.

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;

use super::Chart;
use super::charts::{self, Drawn};
use crate::case::Mode;
use crate::qemu::{self, Measured, Moved, Route, Who};
use crate::units::{MIB, millis_as_seconds};

const SIZE: (u32, u32) = (640, 300);

/// Bars side by side, one for each of both.
struct Group {
    name: &'static str,
    values: [f64; 2],
}

/// All charts of the comparison.
///
/// # Errors
///
/// When one cannot be drawn.
pub fn all(measured: &Measured) -> Result<Vec<Chart>> {
    let group = |name, route, figure: fn(&Moved) -> f64| {
        let value = |who| Some(qemu::moves(measured, who, route, figure)?.median);
        Some(Group { name, values: [value(Who::Qemu)?, value(Who::Ours)?] })
    };
    let time = |route: Route| group(route.name(), route, |moved| millis_as_seconds(moved.total));
    let times = [Route::Socket, Route::MappedRam].map(time);
    let resident = [
        group("source before", Route::Socket, |moved| mebibytes(moved.source[0].region)),
        group("source after", Route::Socket, |moved| mebibytes(moved.source[1].region)),
        group("destination", Route::Socket, |moved| mebibytes(moved.destination.region)),
        group("destination, of a file", Route::MappedRam, |moved| {
            mebibytes(moved.destination.region)
        }),
    ];
    let version = &measured.qemu;
    Ok(vec![
        chart(
            &format!("{version} and this project: total time in seconds"),
            "qemu-total-time.svg",
            &measured.guest,
            &times.into_iter().flatten().collect::<Vec<_>>(),
        )?,
        chart(
            &format!("{version} and this project: MiB resident of the region"),
            "qemu-resident.svg",
            &measured.guest,
            &resident.into_iter().flatten().collect::<Vec<_>>(),
        )?,
    ])
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / MIB as f64
}

fn chart(title: &str, name: &str, guest: &str, groups: &[Group]) -> Result<Chart> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let drawn = draw(&area, title, groups);
        drawn.and_then(|()| Ok(area.present()?)).map_err(|error| anyhow!("{name}: {error}"))?;
    }
    Ok(Chart { title: format!("{title}; {guest}"), name: name.to_owned(), svg })
}

/// A group is two wide, with its middle at an odd number.
fn draw(area: &DrawingArea<SVGBackend<'_>, Shift>, title: &str, groups: &[Group]) -> Drawn<()> {
    let top = groups.iter().flat_map(|group| group.values).fold(f64::EPSILON, f64::max) * 1.25;
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(28)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..2.0 * groups.len() as f64, 0.0..top)?;
    let name = |at: &f64| {
        let is_middle = at.fract() == 0.0 && *at as usize % 2 == 1;
        let group = is_middle.then(|| groups.get(*at as usize / 2)).flatten();
        group.map_or_else(String::new, |group| group.name.to_owned())
    };
    chart
        .configure_mesh()
        .disable_x_mesh()
        .max_light_lines(1)
        .x_labels(2 * groups.len() + 1)
        .x_label_formatter(&name)
        .y_label_formatter(&|value| ((value * 100.0).round() / 100.0).to_string())
        .draw()?;
    for (index, who) in [Who::Qemu, Who::Ours].into_iter().enumerate() {
        let style = colour(who).filled();
        let left = |group: usize| 2.0 * group as f64 + 0.3 + 0.7 * index as f64;
        let bars = groups.iter().enumerate().map(|(number, group)| {
            let left = left(number);
            Rectangle::new([(left, 0.0), (left + 0.7, group.values[index])], style)
        });
        chart
            .draw_series(bars)?
            .label(who.name())
            .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 18, y + 5)], style));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.8))
        .draw()?;
    Ok(())
}

/// Those of the modes that they are.
fn colour(who: Who) -> RGBColor {
    charts::colour(match who {
        Who::Qemu => Mode::BlockAware,
        Who::Ours => Mode::HoleAware,
    })
}
