//! The core is a house: what a module imports is on a lower floor, or before it in its own room.
//!
//! Read from the text of every source file, whatever is behind `use` or written out in full.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The floors from the ground up. A floor has rooms, which know nothing of one another; a room has
/// modules in an order in which each may import those before it.
const FLOORS: &[(&str, &[&[&str]])] = &[
    (
        "ground",
        &[&["error", "cancel", "element", "place", "view", "matrix"]],
    ),
    (
        "vocabulary",
        &[&[
            "geometry", "offsets", "strata", "units", "terms", "spectrum", "merging",
        ]],
    ),
    ("operations", &[&["backend"]]),
    (
        "devices",
        &[
            &[
                "backend::cpu::host",
                "backend::cpu::simd",
                "backend::cpu::openmp",
                "backend::cpu::team",
                "backend::cpu::blas",
                "backend::cpu::elements",
                "backend::cpu::solver",
                "backend::cpu::syrk",
                "backend::cpu::source",
                "backend::cpu::offsets",
                "backend::cpu::patches",
                "backend::cpu::gram",
                "backend::cpu::product",
                "backend::cpu::packed",
                "backend::cpu::merging",
                "backend::cpu",
            ],
            &[
                "backend::cuda::calls",
                "backend::cuda::libraries",
                "backend::cuda::memory",
                "backend::cuda::kernels",
                "backend::cuda::gpu",
                "backend::cuda::findings",
                "backend::cuda::queue",
                "backend::cuda::elements",
                "backend::cuda::blas",
                "backend::cuda::solver",
                "backend::cuda::source",
                "backend::cuda::offsets",
                "backend::cuda::gram",
                "backend::cuda::packed",
                "backend::cuda::merging",
                "backend::cuda",
            ],
        ],
    ),
    ("dispatch", &[&["backend::dispatch"]]),
    (
        "mathematics",
        &[
            &["linalg"],
            &["gram"],
            &["batchnorm"],
            &[
                "kronecker::sum",
                "kronecker::decomposition",
                "kronecker::basis",
                "kronecker::kept",
                "kronecker::product",
                "kronecker::eigenvalue",
                "kronecker::compress",
                "kronecker::conjugate",
                "kronecker::inverse",
                "kronecker::root",
                "kronecker::packed",
                "kronecker",
            ],
        ],
    ),
];

/// Floor, room, and place in the room.
type Address = [usize; 3];

fn plan() -> BTreeMap<&'static str, Address> {
    let mut plan = BTreeMap::new();
    for (floor, (_, rooms)) in FLOORS.iter().enumerate() {
        for (room, modules) in rooms.iter().enumerate() {
            for (index, module) in modules.iter().enumerate() {
                plan.insert(*module, [floor, room, index]);
            }
        }
    }
    plan
}

/// Whether a module at the first address may import one at the second.
fn may_import([floor, room, index]: Address, [other_floor, other_room, before]: Address) -> bool {
    other_floor < floor || (other_floor, other_room) == (floor, room) && before <= index
}

/// The modules that a module of this name and text imports, each as a path from the root; of items,
/// the module that they are in.
fn imports(name: &str, text: &str, modules: &BTreeMap<&str, Address>) -> Vec<String> {
    let mut found = Vec::new();
    for (prefix, rest) in starts(&code_of(text)) {
        let base = match prefix {
            "crate" => String::new(),
            "super" => name
                .rsplit_once("::")
                .map_or("", |(parent, _)| parent)
                .to_owned(),
            _ => name.to_owned(),
        };
        for path in leaves(&base, rest) {
            // The longest part of the path that is a module; the root if none is.
            let mut module = path.as_str();
            while !module.is_empty() && !modules.contains_key(module) {
                module = module.rsplit_once("::").map_or("", |(parent, _)| parent);
            }
            found.push(module.to_owned());
        }
    }
    found
}

/// The text without comments, string literals and tests at its end.
fn code_of(text: &str) -> String {
    let text = text.split("#[cfg(test)]").next().unwrap();
    let lines = text.lines().map(|line| line.split("//").next().unwrap());
    let code = lines.collect::<Vec<_>>().join("\n");
    // Every other piece between quotation marks is a literal.
    code.split('"').step_by(2).collect::<Vec<_>>().join("\"\"")
}

/// What follows each `crate::`, `super::` and `self::`.
fn starts(code: &str) -> Vec<(&'static str, &str)> {
    let mut found = Vec::new();
    for prefix in ["crate", "super", "self"] {
        let marker = format!("{prefix}::");
        for (start, _) in code.match_indices(&marker) {
            let before = code[..start].chars().next_back();
            if !before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') {
                found.push((prefix, &code[start + marker.len()..]));
            }
        }
    }
    found
}

/// Every path of an import: `a::{b, c::d}` has two.
fn leaves(base: &str, text: &str) -> Vec<String> {
    let end = text.find(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':'));
    let (path, rest) = text.split_at(end.unwrap_or(text.len()));
    let joined = [base, path.trim_end_matches(':')]
        .into_iter()
        .filter(|part| !part.is_empty())
        .collect::<Vec<_>>()
        .join("::");
    if !rest.starts_with('{') {
        return vec![joined];
    }
    members(rest)
        .into_iter()
        .flat_map(|member| match member {
            "self" => vec![joined.clone()],
            other => leaves(&joined, other),
        })
        .collect()
}

/// What is between the first brace and the one that closes it, cut at its own commas.
fn members(text: &str) -> Vec<&str> {
    let (mut depth, mut start, mut members) = (0, 1, Vec::new());
    for (index, character) in text.char_indices() {
        match character {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 1 => {
                members.push(text[start..index].trim());
                start = index + 1;
            }
            _ => {}
        }
        if depth == 0 {
            members.push(text[start..index].trim());
            break;
        }
    }
    members.retain(|member| !member.is_empty());
    members
}

/// Every source file but the root, with the path of its module.
fn sources() -> Vec<(String, PathBuf)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut files, mut folders) = (Vec::new(), vec![root.clone()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(&root).unwrap().with_extension("");
                let parts = name.iter().map(|part| part.to_str().unwrap());
                let name = parts.collect::<Vec<_>>().join("::");
                if name != "lib" {
                    files.push((name, path));
                }
            }
        }
    }
    files
}

#[test]
fn imports_run_only_downwards() {
    let plan = plan();
    let mut upward = Vec::new();
    for (name, path) in sources() {
        let own = plan[name.as_str()];
        for module in imports(&name, &fs::read_to_string(path).unwrap(), &plan) {
            let other = plan.get(module.as_str());
            if !other.is_some_and(|&other| may_import(own, other)) {
                let module = if module.is_empty() {
                    "the root"
                } else {
                    &module
                };
                upward.push(format!("{name} imports {module}"));
            }
        }
    }
    assert!(upward.is_empty(), "{upward:#?}");
}

#[test]
fn every_module_has_its_place() {
    let mut there: Vec<_> = sources().into_iter().map(|(name, _)| name).collect();
    there.sort_unstable();
    assert_eq!(there, plan().into_keys().collect::<Vec<_>>());
}

#[test]
fn unsafe_code_is_where_it_may_be() {
    for (name, path) in sources() {
        let code = code_of(&fs::read_to_string(path).unwrap());
        let mut words = code.split(|c: char| !(c.is_alphanumeric() || c == '_'));
        let allowed = name == "view" || name.starts_with("backend::");
        assert!(allowed || !words.any(|word| word == "unsafe"), "{name}");
    }
}

#[test]
fn upward_imports_are_found() {
    let plan = plan();
    let of = |name: &str, text: &str| {
        let own = plan[name];
        let imports = imports(name, text, &plan);
        let upward = imports.into_iter().filter(|module| {
            let other = plan.get(module.as_str());
            !other.is_some_and(|&other| may_import(own, other))
        });
        upward.collect::<Vec<_>>()
    };
    let fine = "use crate::error::{Error, Result};\nuse super::{Backend, team::{Team, lock}};\n\
                // crate::gram\nfn f() { let x = \"crate::gram\"; }\n\
                #[cfg(test)]\nmod tests { use crate::linalg; }";
    assert!(
        of(
            "backend::cpu::gram",
            &fine.replace("super::{Backend", "super::{simd")
        )
        .is_empty()
    );
    assert_eq!(
        of("backend", "use crate::gram::{GramTask, Units};"),
        ["gram", "gram"]
    );
    assert_eq!(
        of("view", "fn f(x: crate::matrix::Matrix<'_, f32>) {}"),
        ["matrix"]
    );
    assert_eq!(
        of(
            "backend::cpu::host",
            "use super::{host, gram::{self, accumulate}};"
        ),
        ["backend::cpu::gram", "backend::cpu::gram"]
    );
    assert_eq!(
        of("backend::cuda", "fn f() { super::cpu::Cpu::current(); }"),
        ["backend::cpu"]
    );
    assert_eq!(of("geometry", "use crate::Error;"), [""]);
    assert_eq!(of("kronecker::sum", "use super::*;"), ["kronecker"]);
    assert_eq!(of("terms", "use self::inner::Thing;"), [""; 0]);
}
