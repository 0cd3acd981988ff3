# The worker's channel to the coordinator.
# -O1: they wait for sockets; -O3 takes three times as long to compile and nothing runs faster.
set_source_files_properties(control_client_beast.cpp PROPERTIES COMPILE_OPTIONS -O1)
add_library(sc_control_client STATIC control_client_beast.cpp)
target_link_libraries(sc_control_client
  PUBLIC sc_config sc_tls
  PRIVATE sc_beast OpenSSL::SSL OpenSSL::Crypto Threads::Threads)
