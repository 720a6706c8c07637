// Loads an ELF kernel into touched guest memory as often as it is told to, with rust-vmm's crate.
//
//   linux-loader-peer VMLINUX RUNS
//
// Prints the milliseconds of each run, one a line.
use linux_loader::loader::{elf::Elf, KernelLoader};
use std::{env, fs::File, time::Instant};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

fn main() {
    let arguments: Vec<String> = env::args().collect();
    let runs: usize = arguments[2].parse().unwrap();
    let size = 256 << 20;
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size)]).unwrap();
    let ones = vec![1u8; 1 << 20];
    for offset in (0..size).step_by(1 << 20) {
        memory.write_slice(&ones, GuestAddress(offset as u64)).unwrap();
    }
    for _ in 0..runs {
        let start = Instant::now();
        let mut image = File::open(&arguments[1]).unwrap();
        Elf::load(&memory, None, &mut image, None).unwrap();
        println!("{}", start.elapsed().as_secs_f64() * 1e3);
    }
}
