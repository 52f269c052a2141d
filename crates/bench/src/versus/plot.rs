//! Latency against load, as a picture: one point for each number of clients, one line for each side and quantile.
//!
//! What never lives here: figures that are in no table. The latency's axis is logarithmic: both sides' lines are read
//! off one picture, however far apart they are.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use super::{Compared, Side};

const SIZE: (u32, u32) = (900, 560);

/// One line of the picture.
struct Line {
    name: String,
    style: ShapeStyle,
    /// Operations a second, and milliseconds.
    points: Vec<(f64, f64)>,
}

/// Draws the comparisons of one workload into an SVG file.
///
/// # Errors
/// When there is nothing to draw, or the file can't be written.
pub(crate) fn draw(path: &Path, workload: &str, compared: &[Compared]) -> Result<()> {
    let lines = lines(compared);
    let all = || lines.iter().flat_map(|line| &line.points);
    let most = all().map(|(load, _)| *load).fold(0.0, f64::max);
    let least = all().map(|(_, ms)| *ms).fold(f64::INFINITY, f64::min);
    let worst = all().map(|(_, ms)| *ms).fold(0.0, f64::max);
    anyhow::ensure!(least > 0.0 && least.is_finite(), "there is nothing to draw");
    let failed = |error: &dyn std::fmt::Display| anyhow!("{} can't be drawn: {error}", path.display());

    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE).map_err(|error| failed(&error))?;
    let mut chart = ChartBuilder::on(&root)
        .caption(format!("{workload}: latency against load"), ("sans-serif", 20))
        .margin(16)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..most * 1.05, (least * 0.8..worst * 1.25).log_scale())
        .map_err(|error| failed(&error))?;
    chart
        .configure_mesh()
        .x_desc("operations a second")
        .y_desc("milliseconds")
        .draw()
        .map_err(|error| failed(&error))?;
    for Line { name, style, points } in lines {
        chart
            .draw_series(LineSeries::new(points.clone(), style).point_size(3))
            .map_err(|error| failed(&error))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], style));
    }
    chart
        .configure_series_labels()
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .draw()
        .map_err(|error| failed(&error))?;
    root.present().map_err(|error| failed(&error))
}

fn lines(compared: &[Compared]) -> Vec<Line> {
    type SideOf = fn(&Compared) -> Option<&Side>;
    let sides: [(&str, RGBColor, SideOf); 2] = [
        ("palyra", BLUE, |one| Some(&one.ours)),
        ("etcd", RED, |one| one.peer.as_ref()),
    ];
    let mut lines = Vec::new();
    for (side, color, of) in sides {
        for (quantile, width) in [("p50", 1), ("p99", 3)] {
            let points = compared.iter().filter_map(of).map(|side| {
                let figures = side.figures();
                let us = if quantile == "p50" {
                    figures.p50_us
                } else {
                    figures.p99_us
                };
                (figures.ops_per_s, us / 1_000.0)
            });
            let points: Vec<(f64, f64)> = points.collect();
            if !points.is_empty() {
                lines.push(Line {
                    name: format!("{side} {quantile}"),
                    style: color.stroke_width(width),
                    points,
                });
            }
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::Round;
    use super::*;

    #[test]
    fn each_side_has_a_line_for_each_quantile() {
        let side = |ops| {
            let mut side = Side::default();
            side.add(Round {
                ops,
                failed: 0,
                why: None,
                time: Duration::from_secs(1),
                spread: [Duration::from_millis(3)].into_iter().collect(),
            });
            side
        };
        let compared = |clients, peer| Compared {
            clients,
            ours: side(900),
            peer,
        };
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("write.svg");
        draw(
            &path,
            "write",
            &[compared(1, Some(side(300))), compared(64, Some(side(400)))],
        )
        .unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        for name in ["palyra p50", "palyra p99", "etcd p50", "etcd p99"] {
            assert!(svg.contains(name), "{name}");
        }
        draw(&path, "write", &[compared(1, None)]).unwrap();
        assert!(!std::fs::read_to_string(&path).unwrap().contains("etcd"));
        assert!(draw(&path, "write", &[]).is_err());
    }
}
