// The two kernels of attention, in a file each.
#pragma once

#include "attention.h"
#include "isa.h"

namespace gemma2::GEMMA2_ISA {

// Below this many values, a loop over threads costs more than it saves (some 2 µs, a value takes 1 ns).
constexpr int64_t kTinyAppend = 8192;

void append_kv(ThreadPool& pool, const AttentionShape& shape, const AppendArguments& args, const BatchTable& table,
               const KVCache& cache);
void attend(ThreadPool& pool, const AttentionShape& shape, const AttendArguments& args, const BatchTable& table,
            const KVCache& cache);

}  // namespace gemma2::GEMMA2_ISA
