// What explain says of products on an H200 (132 multiprocessors): a line for each line "M K N groups all_of_x_type zeros
// portable" of the input. test_gemm_plans.py compiles and runs it.
#include <iostream>

#include "../csrc/cuda/choice.h"

using namespace jax_trirun;
using namespace jax_trirun::cuda;

int main() {
  int64_t m, k, n, groups;
  bool all_of_x_type, zeros, portable;
  while (std::cin >> m >> k >> n >> groups >> all_of_x_type >> zeros >> portable) {
    Problem problem = {};
    problem.m = m, problem.k = k, problem.n = n, problem.groups = groups;
    std::cout << describe({problem, all_of_x_type, zeros, portable}, 90, 132) << "\n";
  }
}
