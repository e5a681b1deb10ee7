//! Charts, as SVG.

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::coord::ranged1d::ValueFormatter;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use super::Chart;
use crate::case::{Mode, Way};
use crate::record::Figures;
use crate::tables;
use crate::units::millis_as_seconds;
use crate::view::{Dimension, View};

const SIZE: (u32, u32) = (640, 400);

/// What is drawn over a dimension.
#[derive(Clone, Copy)]
enum Measure {
    Sent,
    Time,
    SourceResident,
}

impl Measure {
    fn name(self) -> &'static str {
        match self {
            Self::Sent => "MiB sent",
            Self::Time => "total time in seconds",
            Self::SourceResident => "MiB resident at the source afterwards",
        }
    }

    fn of(self, figures: &Figures) -> f64 {
        let mebibytes = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        match self {
            Self::Sent => mebibytes(figures.wire),
            Self::Time => millis_as_seconds(figures.total),
            Self::SourceResident => mebibytes(figures.source[1]),
        }
    }
}

/// A mode, and its points.
struct Line {
    mode: Mode,
    points: Vec<(f64, f64)>,
}

/// All charts of the report.
///
/// # Errors
///
/// When one cannot be drawn.
pub fn all(view: &View<'_>) -> Result<Vec<Chart>> {
    let mut charts = vec![small(view)?];
    for (dimension, measure) in [
        (Dimension::Plugged, Measure::Sent),
        (Dimension::Plugged, Measure::SourceResident),
        (Dimension::Touched, Measure::Sent),
        (Dimension::Touched, Measure::Time),
        (Dimension::Rate, Measure::Sent),
        (Dimension::Region, Measure::Time),
    ] {
        charts.push(chart(view, dimension, measure)?);
    }
    Ok(charts)
}

/// The one of the README.
///
/// # Errors
///
/// When it cannot be drawn.
pub fn small(view: &View<'_>) -> Result<Chart> {
    chart(view, Dimension::Plugged, Measure::Time)
}

fn chart(view: &View<'_>, dimension: Dimension, measure: Measure) -> Result<Chart> {
    let lines: Vec<_> = Mode::ALL
        .into_iter()
        .map(|mode| {
            let records = view.sweep(dimension, Way::Precopy, mode);
            let points = records.into_iter().filter_map(|record| {
                Some((dimension.value(&record.case), measure.of(record.figures()?)))
            });
            Line { mode, points: points.collect() }
        })
        .collect();
    let title = format!("Precopy: {} by {}", measure.name(), dimension.name());
    let slug = |text: &str| text.replace([' ', ','], "-").replace("--", "-");
    let name = format!("{}-by-{}.svg", slug(measure.name()), slug(dimension.name())).to_lowercase();
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let drawn = draw(&area, &title, dimension, measure, &lines);
        drawn.and_then(|()| Ok(area.present()?)).map_err(|error| anyhow!("{name}: {error}"))?;
    }
    Ok(Chart { title: format!("{title}; {}", tables::guest(&view.profile.centre())), name, svg })
}

/// What drawing gives, or why it could not.
pub(super) type Drawn<T> = Result<T, Box<dyn std::error::Error>>;

fn draw(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    title: &str,
    dimension: Dimension,
    measure: Measure,
    lines: &[Line],
) -> Drawn<()> {
    let points = || lines.iter().flat_map(|line| &line.points);
    let most = |of: fn(&(f64, f64)) -> f64| points().map(of).fold(f64::EPSILON, f64::max);
    let (right, top) = (most(|point| point.0), most(|point| point.1) * 1.05);
    area.fill(&WHITE)?;
    let mut builder = ChartBuilder::on(area);
    builder
        .caption(title, ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(42)
        .y_label_area_size(64);
    let axes = [dimension.unit(), measure.name()];
    if dimension == Dimension::Region {
        let chart = builder.build_cartesian_2d((1.0..right).log_scale(), 0.0..top)?;
        fill(chart, axes, lines)
    } else {
        let chart = builder.build_cartesian_2d(0.0..right, 0.0..top)?;
        fill(chart, axes, lines)
    }
}

/// Draws the mesh and the lines into a chart with linear or logarithmic x.
fn fill<'a, 'b: 'a, X>(
    mut chart: ChartContext<'a, SVGBackend<'b>, Cartesian2d<X, RangedCoordf64>>,
    [x, y]: [&str; 2],
    lines: &[Line],
) -> Drawn<()>
where
    X: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    chart.configure_mesh().max_light_lines(1).x_desc(x).y_desc(y).draw()?;
    for Line { mode, points } in lines {
        if points.is_empty() {
            continue;
        }
        let style = colour(*mode).stroke_width(2);
        chart
            .draw_series(LineSeries::new(points.iter().copied(), style).point_size(3))?
            .label(mode.name())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::MiddleRight)
        .background_style(WHITE.mix(0.8))
        .draw()?;
    Ok(())
}

/// Told apart also by those who do not see all colours (Okabe and Ito).
pub(super) fn colour(mode: Mode) -> RGBColor {
    match mode {
        Mode::DiscardBlind => RGBColor(0, 0, 0),
        Mode::ZeroDetecting => RGBColor(230, 159, 0),
        Mode::BlockAware => RGBColor(0, 114, 178),
        Mode::HoleAware => RGBColor(0, 158, 115),
    }
}
