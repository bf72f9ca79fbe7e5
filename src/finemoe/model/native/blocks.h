// A cache in blocks, which many sequences share.
#pragma once

#include <ATen/core/Tensor.h>

#include "attention.h"

namespace finemoe {

// A store [blocks, heads, size, width], and for each sequence where in it its rows lie: row r of sequence b is number
// index[b][r], counting the rows of all heads of a block. Checked, so that nothing beside it is read or written.
Heads in_blocks(const at::Tensor& store, const at::Tensor& index, const char* name, int64_t batch);

}  // namespace finemoe
