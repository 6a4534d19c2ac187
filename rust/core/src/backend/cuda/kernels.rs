//! Our own kernels: compiled at run time, and launched with arguments held against their text.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::LazyLock;

use cudarc::driver::{result, sys};
use cudarc::nvrtc;

use super::calls::failed;
use super::libraries;
use crate::element::Dtype;
use crate::error::{Error, Result};

/// The text of all kernels.
const SOURCE: &str = include_str!("kernels.cu");

/// One argument of a kernel. All are made of words of eight bytes, so that none is ever padded.
#[derive(Debug, Clone)]
pub(super) enum Argument {
    /// A device address.
    Pointer(u64),
    /// A `u64`.
    Count(u64),
    /// A `double`.
    Number(f64),
    /// A structure of `u64`.
    Words(Vec<u64>),
}

impl Argument {
    fn kind(&self) -> Kind {
        match self {
            Self::Pointer(_) => Kind::Pointer,
            Self::Count(_) => Kind::Count,
            Self::Number(_) => Kind::Number,
            Self::Words(words) => Kind::Words(words.len()),
        }
    }

    /// Where the driver finds the argument; it reads it before the launch returns.
    fn pointer(&mut self) -> *mut c_void {
        match self {
            Self::Pointer(value) | Self::Count(value) => std::ptr::from_mut(value).cast(),
            Self::Number(value) => std::ptr::from_mut(value).cast(),
            Self::Words(words) => words.as_mut_ptr().cast(),
        }
    }
}

/// What a kernel expects in one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Pointer,
    Count,
    Number,
    Words(usize),
}

/// What each kernel expects, read from its text.
static SIGNATURES: LazyLock<HashMap<&'static str, Vec<Kind>>> =
    LazyLock::new(|| signatures(SOURCE));

fn signatures(source: &str) -> HashMap<&str, Vec<Kind>> {
    let mut structures: HashMap<&str, usize> = HashMap::new();
    for text in source.split("\nstruct ").skip(1) {
        let (Some((name, rest)), Some(end)) = (text.split_once(" {"), text.find("\n};")) else {
            continue;
        };
        let body = &rest[..end.saturating_sub(name.len() + 2)];
        // Words of a field: those of its structure, or one for each name and array element.
        let fields = body.split(';').filter_map(|field| {
            let mut words = field.split_whitespace();
            let each = match words.next()? {
                "u64" => 1,
                other => *structures.get(other)?,
            };
            let names = words.collect::<String>();
            let of_name = |name: &str| {
                let extent = name
                    .split_once('[')
                    .and_then(|(_, rest)| rest.split(']').next());
                extent.map_or(1, |extent| extent.parse().unwrap_or(0))
            };
            Some(each * names.split(',').map(of_name).sum::<usize>())
        });
        let words = fields.sum();
        structures.insert(name, words);
    }
    let kind = |argument: &str| {
        let words: Vec<&str> = argument.split_whitespace().collect();
        match words[..words.len() - 1].join(" ").as_str() {
            "u64" => Kind::Count,
            "double" => Kind::Number,
            pointer if pointer.ends_with('*') => Kind::Pointer,
            structure => Kind::Words(structures.get(structure).copied().unwrap_or(0)),
        }
    };
    let kernels = source.split("extern \"C\" __global__ void ").skip(1);
    kernels
        .filter_map(|text| {
            let (name, rest) = text.split_once('(')?;
            let (arguments, _) = rest.split_once(')')?;
            Some((name, arguments.split(',').map(kind).collect()))
        })
        .collect()
}

/// Names of all kernels.
pub fn names() -> Vec<&'static str> {
    let mut names: Vec<_> = SIGNATURES.keys().copied().collect();
    names.sort_unstable();
    names
}

/// The name of a type in the text of the kernels.
fn name_of(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::Float32 => "float",
        Dtype::Float64 => "double",
        Dtype::Float16 => "Half",
        Dtype::BFloat16 => "BFloat16",
    }
}

/// Compiles all kernels for elements of one type, computing in another, to machine code for an
/// architecture such as `sm_90`.
///
/// # Errors
///
/// [`Error::Cuda`] with the compiler's own words.
pub fn compile(element: Dtype, real: Dtype, architecture: &str) -> Result<Vec<u8>> {
    libraries::require_compiler()?;
    let text = |text: String| {
        CString::new(text)
            .map_err(|_| Error::Cuda("a text for the compiler holds a zero".to_owned()))
    };
    let source = text(SOURCE.to_owned())?;
    let program = Program(
        nvrtc::result::create_program(&source, Some(c"kernels.cu"))
            .map_err(|error| failed("nvrtcCreateProgram", error.0))?,
    );
    let options = [
        format!("--gpu-architecture={architecture}"),
        format!("-DELEMENT={}", name_of(element)),
        format!("-DREAL={}", name_of(real)),
        "--std=c++17".to_owned(),
    ];
    let options = options.map(text).into_iter().collect::<Result<Vec<_>>>()?;
    let pointers: Vec<_> = options.iter().map(|option| option.as_ptr()).collect();
    // SAFETY: the program is alive, and so are the texts of the options.
    let outcome = unsafe {
        nvrtc::sys::nvrtcCompileProgram(program.0, pointers.len() as i32, pointers.as_ptr())
    };
    if let Err(error) = outcome.result() {
        return Err(Error::Cuda(format!(
            "the kernels did not compile for {architecture} ({:?}): {}",
            error.0,
            program.log()
        )));
    }
    program.machine_code()
}

/// A program of the compiler's, destroyed when it goes.
struct Program(nvrtc::sys::nvrtcProgram);

impl Program {
    fn log(&self) -> String {
        // SAFETY: the program is alive.
        let log = unsafe { nvrtc::result::get_program_log(self.0) }.unwrap_or_default();
        let bytes: Vec<u8> = log
            .iter()
            .map(|&c| c as u8)
            .take_while(|&c| c != 0)
            .collect();
        String::from_utf8_lossy(&bytes).trim().to_owned()
    }

    fn machine_code(&self) -> Result<Vec<u8>> {
        let mut size = 0;
        // SAFETY: the program is alive; the call writes one number.
        unsafe { nvrtc::sys::nvrtcGetCUBINSize(self.0, &mut size) }
            .result()
            .map_err(|error| failed("nvrtcGetCUBINSize", error.0))?;
        let mut code = vec![0u8; size];
        // SAFETY: the program is alive, and there is room for as much as it said.
        unsafe { nvrtc::sys::nvrtcGetCUBIN(self.0, code.as_mut_ptr().cast()) }
            .result()
            .map_err(|error| failed("nvrtcGetCUBIN", error.0))?;
        Ok(code)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: the program is destroyed once. Nothing could be done about a failure.
        let _ = unsafe { nvrtc::result::destroy_program(self.0) };
    }
}

/// All kernels for one pair of types, on one device.
pub(super) struct Kernels(HashMap<&'static str, sys::CUfunction>);

// SAFETY: a function handle may be used by any thread that has its context current, and the module
// it belongs to is never unloaded.
unsafe impl Send for Kernels {}
// SAFETY: as above.
unsafe impl Sync for Kernels {}

impl Kernels {
    /// Compiles the kernels and loads them into the current context.
    pub(super) fn load(element: Dtype, real: Dtype, architecture: &str) -> Result<Self> {
        let code = compile(element, real, architecture)?;
        // SAFETY: the compiler made the image; the driver copies it.
        let module = unsafe { result::module::load_data(code.as_ptr().cast()) }
            .map_err(|error| failed("cuModuleLoadData", error.0))?;
        let mut functions = HashMap::new();
        for &name in SIGNATURES.keys() {
            let text = CString::new(name)
                .map_err(|_| Error::Cuda(format!("{name:?} is no name of a kernel")))?;
            // SAFETY: the module was just loaded.
            let function = unsafe { result::module::get_function(module, text) }
                .map_err(|error| failed("cuModuleGetFunction", error.0))?;
            functions.insert(name, function);
        }
        Ok(Self(functions))
    }

    /// Queues a kernel on a stream.
    ///
    /// # Safety
    ///
    /// The addresses among the arguments are of device memory that holds what the kernel, told the
    /// other arguments, reads and writes, for as long as the stream's work lasts; the kernels'
    /// context is current.
    pub(super) unsafe fn launch(
        &self,
        name: &str,
        blocks: [u32; 3],
        threads: u32,
        stream: sys::CUstream,
        mut arguments: Vec<Argument>,
    ) -> Result<()> {
        let expected = SIGNATURES.get(name).map_or(&[][..], Vec::as_slice);
        let given: Vec<_> = arguments.iter().map(Argument::kind).collect();
        let (Some(&function), true) = (self.0.get(name), given == expected) else {
            return Err(Error::Internal(format!(
                "kernel {name}: expected the arguments {expected:?}, got {given:?}"
            )));
        };
        let mut pointers: Vec<_> = arguments.iter_mut().map(Argument::pointer).collect();
        let [x, y, z] = blocks;
        // SAFETY: the arguments are as many and of the kinds that the kernel's text asks for; the
        // rest is the caller's promise.
        unsafe {
            result::launch_kernel(
                function,
                (x, y, z),
                (threads, 1, 1),
                0,
                stream,
                &mut pointers,
            )
        }
        .map_err(|error| failed(&format!("launch of kernel {name}"), error.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_are_read_from_the_text() {
        let text = "\nstruct Pair {\n    u64 a, b[3];\n};\n\nstruct Two {\n    Pair x;\n    Pair y;\n    u64 z;\n};\n\
                    extern \"C\" __global__ void f(\n    const S* x, Two two, u64 n, double d)\n{";
        let kinds = vec![Kind::Pointer, Kind::Words(9), Kind::Count, Kind::Number];
        assert_eq!(signatures(text), HashMap::from([("f", kinds)]));
    }

    #[test]
    fn every_kernel_has_known_arguments() {
        assert!(names().contains(&"pack_patches"));
        assert_eq!(SIGNATURES["sum_patches"][1], Kind::Words(23));
        assert_eq!(SIGNATURES["first_non_finite"][1], Kind::Words(10));
        let unknown = |kinds: &&Vec<Kind>| kinds.contains(&Kind::Words(0));
        assert_eq!(SIGNATURES.values().filter(unknown).count(), 0);
    }
}
