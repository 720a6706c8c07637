//! The workloads of `benchmarks/memory.py` on rust-vmm's vm-memory: `vm-memory-peer WORKLOAD
//! [PLACE]` prints the nanoseconds of one operation, the median of many loops.

use std::fs::File;
use std::hint::black_box;
use std::num::NonZeroUsize;
use std::sync::atomic::Ordering;
use std::time::Instant;

use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{
    ByteValued, Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend,
    GuestMemoryMmap,
};

const REGION: u64 = 2 << 30;
const LENGTH: usize = 512;

#[derive(Clone, Copy)]
#[repr(C)]
struct Small(u64);
unsafe impl ByteValued for Small {}

#[derive(Clone, Copy)]
#[repr(C)]
struct Big([u64; 12]);
unsafe impl ByteValued for Big {}

fn time(calls: usize, mut work: impl FnMut()) -> f64 {
    let mut runs: Vec<f64> = (0..15)
        .map(|_| {
            let start = Instant::now();
            for _ in 0..calls {
                work();
            }
            start.elapsed().as_nanos() as f64 / calls as f64
        })
        .collect();
    runs.sort_by(f64::total_cmp);
    runs[runs.len() / 2]
}

fn place(name: &str) -> GuestAddress {
    GuestAddress(match name {
        "crossing-0-1" => REGION - LENGTH as u64 / 2,
        "crossing-6-7" => 7 * REGION - LENGTH as u64 / 2,
        "last" => 7 * REGION + 0x1000,
        _ => 0x1000,
    })
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let workload = arguments[1].as_str();
    let at = place(arguments.get(2).map_or("first", String::as_str));
    // The small objects cross as well: their middle lies where the middle of 512 bytes does.
    let cross = arguments.get(2).is_some_and(|name| name.starts_with("crossing"));
    let small = if cross { GuestAddress(at.0 + 252) } else { at };
    let big = if cross { GuestAddress(at.0 + 208) } else { at };
    let ranges: Vec<_> = (0..8).map(|i| (GuestAddress(i * REGION), REGION as usize)).collect();
    let memory = GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap();
    let mut buffer = vec![0u8; LENGTH];
    let m = &memory;
    let result = match workload {
        "read_from" => time(20000, || { black_box(m.read(black_box(&mut buffer), at).unwrap()); }),
        "read_entire_slice_from" | "read_slice_from" | "read_exact_from" => {
            time(20000, || m.read_slice(black_box(&mut buffer), at).unwrap())
        }
        "write_to" => time(20000, || { black_box(m.write(black_box(&buffer), at).unwrap()); }),
        "write_entire_slice_to" | "write_slice_to" | "write_exact_to" => {
            time(20000, || m.write_slice(black_box(&buffer), at).unwrap())
        }
        "read_from_file" => {
            let mut file = File::open("/dev/zero").unwrap();
            time(5000, || { black_box(m.read_volatile_from(at, &mut file, LENGTH).unwrap()); })
        }
        "write_to_file" => {
            let mut file = File::options().write(true).open("/dev/null").unwrap();
            time(5000, || { black_box(m.write_volatile_to(at, &mut file, LENGTH).unwrap()); })
        }
        "read_small_obj_from" => time(20000, || { black_box(m.read_obj::<Small>(small).unwrap().0); }),
        "write_small_obj_to" => time(20000, || m.write_obj(black_box(Small(1)), small).unwrap()),
        "read_big_obj_from" => time(20000, || { black_box(m.read_obj::<Big>(big).unwrap().0); }),
        "write_big_obj_to" => time(20000, || m.write_obj(black_box(Big([1; 12])), big).unwrap()),
        "load" => time(20000, || { black_box(m.load::<u32>(at, Ordering::Acquire).unwrap()); }),
        "store" => time(20000, || m.store(black_box(1u32), at, Ordering::Release).unwrap()),
        "find_region" => {
            let ranges: Vec<_> = (0..256).map(|i| (GuestAddress(i * 8192), 4096)).collect();
            let many = GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap();
            let mut i = 0;
            time(20000, || {
                black_box(many.find_region(GuestAddress(i * 8192 + 100)));
                i = (i + 37) % 256;
            })
        }
        "swap" => {
            let atomic = GuestMemoryAtomic::new(memory.clone());
            time(5000, || atomic.lock().unwrap().replace(memory.clone()))
        }
        "snapshot" => {
            let atomic = GuestMemoryAtomic::new(memory.clone());
            time(20000, || { black_box(&*atomic.memory()); })
        }
        _ => {
            let pages: usize = workload.strip_prefix("mark-").and_then(|n| n.parse().ok()).unwrap();
            let bitmap = AtomicBitmap::new(1 << 30, NonZeroUsize::new(4096).unwrap());
            time(20000, || bitmap.mark_dirty(black_box(4096 * 7), pages * 4096))
        }
    };
    println!("{result}");
}
